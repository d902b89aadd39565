"""from-torch and to-torch: the goldens of the PyTorch reference, and what is refused."""

import os

import numpy as np
import pytest
import torch

import grain_jax
from benchmarks.parity import comparison
from benchmarks.parity import goldens as goldens_parity
from grain_jax.checkpoint import saved_model
from grain_jax.convert import parity
from grain_jax.convert.__main__ import main
from grain_jax.convert.reference import commands as files
from grain_jax.convert.reference import names
from tests import perturbed

torch.set_num_threads(1)  # small matrices; threads would only wait for each other
FLAGS = ["--image-heads", "3", "--text-heads", "5", "--decoder-heads", "6"]


def made_up():
    """Entries of random values; not the goldens' sizes, and no two alike."""
    model = perturbed.tiny(
        **dict(image__width=36, image__heads=3, image__depth=3, image__mlp_dim=108),
        **dict(text__width=40, text__heads=5, text__depth=1, text__mlp_dim=120),
        **dict(decoder__width=48, decoder__heads=6, decoder__mlp_dim=144),
        image__qk_norm=True,
    )
    return names.reference_state(model, perturbed.params(model))


def save(path, state, prefix="module."):
    stored = {"epoch": 4, "best_acc": 12.5, "iteration": 99, "optimizer": {"state": {}}}
    for part, key in files.KEYS.items():
        arrays = goldens_parity.below(state, f"{part}.")
        stored[key] = {prefix + name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save(stored, path)
    return str(path)


def test_another_size_than_the_goldens(tmp_path, capsys):
    """tests/test_parity.py compares the outputs of the goldens' size with what the reference itself gave."""
    path = save(tmp_path / "x.pth.tar", made_up())
    assert main(["from-torch", "--input", path, "--output", str(tmp_path / "out"), *FLAGS]) == 0
    report = capsys.readouterr().out
    assert "parity: PROVEN" in report and "ASSUMED" not in report
    model = grain_jax.load(str(tmp_path / "out"))
    assert model.model.image.image_size == 40 and model.model.image.qk_norm
    assert (model.model.text.vocab_size, model.model.text.context_length) == (300, 32)
    assert model.model.decoder.queries == 3 and model.model.embed_dim == 28


def test_heads_that_are_not_given(tmp_path, capsys):
    path = save(tmp_path / "x.pth.tar", made_up(), prefix="")
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
    state = made_up()
    del state["backbone.ln_final.bias"]
    del state["decoder.transformer.decoder.layers.1.self_attn.in_proj_weight"]
    state["backbone.visual.blocks.1.mlp.fc1.weight"] = np.zeros((107, 36), np.float32)
    state["decoder.bbox_embed.layers.1.bias"][3] = np.nan
    state["decoder.adapter.weight"] = np.zeros((2, 2), np.float32)
    path = save(tmp_path / "x.pth.tar", state)
    assert main(["from-torch", "--input", path, "--output", str(tmp_path / "out"), *FLAGS]) == 2
    assert capsys.readouterr().err.strip().split("\n") == [
        f"{path}: backbone.visual.blocks.1.mlp.fc1.weight: got shape (107, 36), expected (108, 36)",
        f"{path}: backbone.ln_final.bias: missing",
        f"{path}: decoder.transformer.decoder.layers.1.self_attn.in_proj_weight: missing",
        f"{path}: decoder.bbox_embed.layers.1.bias: holds values that are not finite",
        f"{path}: decoder.adapter.weight: unknown key, shape (2, 2)",
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
    if case in ("sizes", "cut"):
        state = made_up()
        if case == "sizes":
            state["backbone.visual.pos_embed"] = np.zeros((1, 24, 36), np.float32)
        save(path, state)
        path.write_bytes(path.read_bytes()[: 5000 if case == "cut" else None])
    elif build:
        torch.save(build(str(marker)), path)
    out = tmp_path / "out"
    assert main(["from-torch", "--input", str(path), "--output", str(out), *FLAGS]) == 2
    first, last = capsys.readouterr().err.strip().split("\n")
    assert first.startswith(f"{path}: ") and said in first
    assert last == "1 fault; nothing was written"
    assert "weights_only" not in first  # torch's advice is to load the file unchecked
    assert not marker.exists() and not out.exists()


@pytest.fixture(scope="module")
def golden():
    return goldens_parity.goldens()


def test_golden_to_jax_and_back_is_identical(golden, tmp_path, capsys):
    saved_model.save_model(tmp_path / "model", golden.model, golden.params)
    path = tmp_path / "x.pth.tar"
    assert main(["to-torch", "--input", str(tmp_path / "model"), "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("parity: PROVEN")
    stored = torch.load(path, weights_only=True)
    assert set(stored) == {"epoch", "iteration", "best_acc", "optimizer", "state_dict", "backbone_state_dict"}
    assert all(name.startswith("module.") for name in stored["state_dict"])
    written, original = files.read(path), goldens_parity.state_of(golden.arrays)
    assert written.keys() == original.keys()  # the reference loads strictly
    for name, array in original.items():
        if name in names.UNUSED:
            assert not written[name].any()
        else:
            np.testing.assert_array_equal(written[name], array)
            assert written[name].shape == array.shape
    assert written["decoder.class_embed.weight"].shape == (22048, 64)
    assert written["decoder.pos_embed"].shape == (1, 513, 64)
    assert written["backbone.image_projection"].shape == (48, 512)


def test_the_torch_module_gives_the_references_outputs(golden):
    a = golden.arrays
    module = files.make_module(golden.model, goldens_parity.state_of(a))
    with torch.no_grad():
        tokens = module.backbone.visual(torch.tensor(a["inputs/images"]))
        image, regions, boxes = module.decoder(tokens)
        text = module.get_text_features(torch.tensor(a["inputs/text"]).long())
    for ours, name in (
        (tokens, "vision_tokens"),
        (image, "img_embed"),
        (regions, "obj_embeds"),
        (boxes[-1], "pred_boxes"),
        (boxes[0], "aux/0/pred_boxes"),
        (text, "text_embed"),
    ):
        assert comparison.relative(name, ours.numpy(), a[f"outputs/{name}"]).ok, name


def test_what_the_references_format_cannot_hold_is_a_line_each(tmp_path, capsys):
    other = dict(image__pre_norm=True, text__activation="gelu", logit_bias_init=-10.0)
    model = perturbed.tiny(decoder__image_pool="all", **other)
    saved_model.save_model(tmp_path / "model", model, perturbed.params(model))
    two = perturbed.tiny(decoder=None, image__norm_eps=1e-6, image__pool="class")
    saved_model.save_model(tmp_path / "two", two, {"logit_scale": np.zeros(())})
    out = tmp_path / "x.pth.tar"
    for source, target, expected_words in (
        ("model", out, ["logit_bias_init: got -10.0", "image.pre_norm: got True",
                        "text.activation: got gelu", "decoder.image_pool: got all"]),
        ("two", out, ["model.decoder: got None, the PyTorch reference has regions"]),
        ("model", tmp_path, [f"{tmp_path}: is a folder"]),
        ("nowhere", out, ["nowhere: no such folder"]),
    ):  # fmt: skip
        arguments = ["--input", str(tmp_path / source), "--output", str(target)]
        assert main(["to-torch", *arguments]) == 2 and not out.exists()
        said = capsys.readouterr().err.splitlines()
        assert len(said) == len(expected_words) + 1
        assert all(word in line for word, line in zip(expected_words, said))


def test_a_failed_parity_is_exit_status_1_and_other_heads_are_told(tmp_path, capsys, monkeypatch):
    model = perturbed.tiny()
    saved_model.save_model(tmp_path / "model", model, perturbed.params(model))
    monkeypatch.setattr(names, "REFERENCE_HEADS", {("decoder", 36): 9, ("image", 48): 4})
    right = parity.clip_outputs
    wrong = lambda *args: right(*args) | {"text_embed": right(*args)["text_embed"] * 1.001}
    arguments = ["--input", str(tmp_path / "model"), "--output", str(tmp_path / "x.pth.tar")]
    monkeypatch.setattr(parity, "clip_outputs", wrong)
    assert main(["to-torch", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out.endswith("parity: FAILED: text_embed\n") and "nothing was written" not in err
    (line,) = [line for line in out.splitlines() if "ATTENTION" in line]
    assert line.startswith("decoder: width 36, depth 2, 3 heads") and " 9 " in line
    monkeypatch.setattr(parity, "clip_outputs", lambda *args: {})
    assert main(["to-torch", *arguments]) == 1
    assert "text_embed: only one side gives it" in capsys.readouterr().err
