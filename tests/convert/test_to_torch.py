import numpy as np
import pytest
import torch

from benchmarks.parity import comparison
from benchmarks.parity import goldens as goldens_parity
from grain_jax.checkpoint import saved_model
from grain_jax.convert import parity
from grain_jax.convert.__main__ import main
from grain_jax.convert.reference import commands as files
from grain_jax.convert.reference import names
from tests import perturbed

torch.set_num_threads(1)  # small matrices; threads would only wait for each other


@pytest.fixture(scope="module")
def golden():
    return goldens_parity.goldens()


def golden_states(golden):
    parts = ("backbone", "decoder")
    return {part: goldens_parity.below(golden.arrays, f"params/{part}/") for part in parts}


def test_golden_to_jax_and_back_is_identical(golden, tmp_path, capsys):
    saved_model.save_model(tmp_path / "model", golden.model, golden.params)
    path = tmp_path / "x.pth.tar"
    assert main(["to-torch", "--input", str(tmp_path / "model"), "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("parity: PROVEN")
    stored = torch.load(path, weights_only=True)
    assert set(stored) == {
        *("epoch", "iteration", "best_acc", "optimizer"),
        *("state_dict", "backbone_state_dict"),
    }
    assert all(name.startswith("module.") for name in stored["state_dict"])
    written, original = files.read(path), golden_states(golden)
    for which, state in original.items():
        assert written[which].keys() == state.keys()  # the reference loads strictly
        for name, array in state.items():
            if name in names.UNUSED[which]:
                assert not written[which][name].any()
            else:
                np.testing.assert_array_equal(written[which][name], array)
                assert written[which][name].shape == array.shape
    assert written["decoder"]["class_embed.weight"].shape == (22048, 64)
    assert written["decoder"]["pos_embed"].shape == (1, 513, 64)
    assert written["backbone"]["image_projection"].shape == (48, 512)


def test_the_torch_module_gives_the_references_outputs(golden):
    a, module = golden.arrays, files.make_module(golden.model)
    files.load_states(module, golden_states(golden))
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
    out = tmp_path / "x.pth.tar"
    for source, target, expected_words in (
        ("model", out, ["logit_bias_init: got -10.0", "image.pre_norm: got True",
                        "text.activation: got gelu", "decoder.image_pool: got all"]),
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
