import os

import numpy as np
import pytest
import torch

import grain_jax
from grain_jax.convert.__main__ import main
from grain_jax.convert.reference import names
from tests import perturbed

FLAGS = ["--image-heads", "3", "--text-heads", "5", "--decoder-heads", "6"]


def made_up():
    """State dicts of random values; not the goldens' sizes, and no two alike."""
    model = perturbed.tiny(
        **dict(image__width=36, image__heads=3, image__depth=3, image__mlp_dim=108),
        **dict(text__width=40, text__heads=5, text__depth=1, text__mlp_dim=120),
        **dict(decoder__width=48, decoder__heads=6, decoder__mlp_dim=144),
        image__qk_norm=True,
    )
    return names.to_states(model, perturbed.params(model))


def save(path, states, prefix="module."):
    tensors = {
        module: {prefix + name: torch.from_numpy(array) for name, array in state.items()}
        for module, state in states.items()
    }
    stored = {"epoch": 4, "best_acc": 12.5, "iteration": 99, "optimizer": {"state": {}}}
    stored |= {"state_dict": tensors["decoder"], "backbone_state_dict": tensors["backbone"]}
    torch.save(stored, path)
    return str(path)


def test_another_size_than_the_goldens(tmp_path, capsys):
    """tests/test_parity.py compares the outputs of the goldens' size with what the reference itself gave."""
    states = made_up()
    path = save(tmp_path / "x.pth.tar", states)
    assert main(["from-torch", "--input", path, "--output", str(tmp_path / "out"), *FLAGS]) == 0
    report = capsys.readouterr().out
    assert "parity: PROVEN" in report and "ASSUMED" not in report

    model = grain_jax.load(str(tmp_path / "out"))
    assert model.model.image.image_size == 40 and model.model.image.qk_norm
    assert (model.model.text.vocab_size, model.model.text.context_length) == (300, 32)
    assert model.model.decoder.queries == 3 and model.model.embed_dim == 28


def test_heads_that_are_not_given(tmp_path, capsys):
    states = made_up()
    path = save(tmp_path / "x.pth.tar", states, prefix="")
    arguments = ["from-torch", "--input", path, "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert [line.split(": ")[1] for line in lines[:-1]] == ["--text-heads", "--decoder-heads"]
    assert lines[-1] == "2 faults; nothing was written"
    assert main([*arguments, "--text-heads", "7", "--decoder-heads", "6", "--image-heads", "4"]) == 2
    err = capsys.readouterr().err
    assert "image heads: got 4, expected 3" in err
    assert "text heads: got 7, expected a divisor of the width 40" in err
    assert not (tmp_path / "out").exists()


def test_every_wrong_entry_is_a_line(tmp_path, capsys):
    states = made_up()
    backbone, decoder = states["backbone"], states["decoder"]
    del backbone["ln_final.bias"]
    del decoder["transformer.decoder.layers.1.self_attn.in_proj_weight"]
    backbone["visual.blocks.1.mlp.fc1.weight"] = np.zeros((107, 36), np.float32)
    decoder["bbox_embed.layers.1.bias"][3] = np.nan
    decoder["adapter.weight"] = np.zeros((2, 2), np.float32)
    path = save(tmp_path / "x.pth.tar", states)
    assert main(["from-torch", "--input", path, "--output", str(tmp_path / "out"), *FLAGS]) == 2
    assert capsys.readouterr().err.strip().split("\n") == [
        f"{path}: backbone visual.blocks.1.mlp.fc1.weight: got shape (107, 36), expected (108, 36)",
        f"{path}: backbone ln_final.bias: missing",
        f"{path}: decoder transformer.decoder.layers.1.self_attn.in_proj_weight: missing",
        f"{path}: decoder bbox_embed.layers.1.bias: holds values that are not finite",
        f"{path}: decoder adapter.weight: unknown key, shape (2, 2)",
        "5 faults; nothing was written",
    ]
    assert not (tmp_path / "out").exists()


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _stored(decoder, **backbone):
    return {"state_dict": decoder, "backbone_state_dict": backbone}


ZEROS = torch.zeros(2)
BAD = {  # what is in the file, which makes folders at `marker` if it is run; the line
    "hostile": (
        lambda marker: _stored(Hostile(marker)),
        f"tensors (it asks for {os.name}.mkdir; what might run code is not loaded)",
    ),
    "cut": (lambda _: None, "not a checkpoint of plain tensors"),
    "twice": (
        lambda _: _stored({"a": ZEROS, "module.a": ZEROS}),
        "decoder a: is there with and without module.",
    ),
    "no_state_dicts": (
        lambda _: {"state_dict": {}, "epoch": 1},
        "no state dict 'backbone_state_dict'; the file has state_dict, epoch",
    ),
    "missing": (None, "no such file"),
    "sizes": (lambda _: {}, "visual.pos_embed: got 24 positions, expected a square"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line(tmp_path, capsys, case):
    (build, said), path, marker = BAD[case], tmp_path / "x.pth.tar", tmp_path / "executed"
    stored = build(str(marker)) if build else None
    if case == "sizes":
        states = made_up()
        states["backbone"]["visual.pos_embed"] = np.zeros((1, 24, 36), np.float32)
        save(path, states)
    elif case == "cut":
        save(path, made_up())
        path.write_bytes(path.read_bytes()[:5000])
    elif build:
        torch.save(stored, path)
    out = tmp_path / "out"
    assert main(["from-torch", "--input", str(path), "--output", str(out), *FLAGS]) == 2
    first, last = capsys.readouterr().err.strip().split("\n")
    assert first.startswith(f"{path}: ") and said in first
    assert last == "1 fault; nothing was written"
    assert "weights_only" not in first  # torch's advice is to load the file unchecked
    assert not marker.exists() and not out.exists()
