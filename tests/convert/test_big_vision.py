"""from-big-vision against what big_vision itself gave (goldens/big_vision_*.npz), and its faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax.checkpoint import saved_model
from grain_jax.convert.__main__ import main
from grain_jax.convert.big_vision import from_big_vision
from grain_jax.convert.faults import ConvertError
from tests import foreign
from tests.paths import GOLDENS


def _golden(which):
    with np.load(GOLDENS / f"big_vision_{which}.npz") as stored:
        return dict(stored)


def _params(which):
    return {k: v for k, v in _golden(which).items() if k.startswith("params/")}


def _converted(folder, arrays, subtree=""):
    """(the model, its parameters)."""
    np.savez(folder / "m.npz", **arrays)
    assert from_big_vision(f"{folder}/m.npz{subtree}", folder / "ours").ok
    return saved_model.load_model(folder / "ours")[:2]


@pytest.mark.parametrize("which", ["map", "tok"])
def test_outputs_are_big_visions_and_its_arrays_come_out_as_they_went_in(which, tmp_path, capsys):
    golden = _golden(which)
    model, params = _converted(tmp_path, _params(which))
    theirs = golden["outputs/image_embed"], golden["outputs/text_embed"]
    foreign.close_to_ours(model, params, golden["inputs/image"], golden["inputs/text"], theirs)
    np.testing.assert_allclose(np.exp(params["logit_scale"]), golden["outputs/t"][0], rtol=1e-6)
    assert ("logit_bias" in params) == (which == "map")
    assert model.image.pool == {"map": "map", "tok": "class"}[which]
    assert model.image.projection == {"map": "none", "tok": "affine"}[which]
    assert (model.image.heads, model.text.pool, model.text.causal) == (2, "last", False)
    arguments = ["--input", str(tmp_path / "ours"), "--output", str(tmp_path / "out.npz")]
    assert main(["to-big-vision", *arguments]) == 0
    assert "for its config: {'image': {'width': 32," in capsys.readouterr().out
    with np.load(tmp_path / "out.npz") as written:
        assert set(written) == set(_params(which))
        for name, array in _params(which).items():
            np.testing.assert_array_equal(written[name], array, err_msg=name, strict=True)


def _stacked(params):
    """As big_vision's scan keeps layers."""
    out = {k: v for k, v in params.items() if "encoderblock_" not in k}
    for name in params:
        if "encoderblock_0" in name:
            other = name.replace("encoderblock_0", "encoderblock_1")
            out[name.replace("encoderblock_0", "encoderblock")] = np.stack([params[name], params[other]])
    return out


def test_stacked_layers_and_a_subtree_in_bfloat16_are_the_same_model(tmp_path):
    model, params = _converted(tmp_path, _params("map"))
    other, arrays = _converted(tmp_path, _stacked(_params("map")))
    assert other == model
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), params, arrays)
    half = {
        f"model/opt/target{k.removeprefix('params')}": v.astype(jnp.bfloat16).view("V2")
        for k, v in _params("map").items()
    }
    arrays = _converted(tmp_path, half, ":model/opt/target")[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-8), params, arrays)


@pytest.mark.parametrize(
    "change,path,message",
    [
        (lambda p: p.pop("params/img/embedding/kernel"), "", "img/embedding/kernel: missing"),
        (lambda p: p.pop("params/t"), "", "m.npz: t: missing"),
        (lambda p: p.update({"params/img/pre_logits/bias": np.zeros(3)}), "", "unknown key"),
        (
            lambda p: p.update({"params/txt/head/bias": np.zeros(3)}),
            "",
            "txt/head/bias: got shape (3,), expected (32,)",
        ),
        (lambda p: None, ":image", "no sub-tree 'image'; there are: b, img, t, txt"),
        (lambda p: None, "/none.npz:img", "none.npz: no such file"),
    ],
)
def test_faults_are_one_line_each(change, path, message, tmp_path):
    params = _params("map")
    change(params)
    np.savez(tmp_path / "m.npz", **params)
    with pytest.raises(ConvertError) as error:
        from_big_vision(f"{tmp_path}/m.npz{path}", tmp_path / "ours")
    assert message in str(error.value) and "\n" not in str(error.value)
