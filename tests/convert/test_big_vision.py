"""from-big-vision against what big_vision itself gave (goldens/big_vision_*.npz), and what it says of faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.convert import towers
from grain_jax.convert.big_vision import checkpoint as files
from grain_jax.convert.big_vision.command import from_big_vision
from grain_jax.convert.big_vision.towers import import_tower
from grain_jax.convert.faults import ConvertError
from grain_jax.train import initialise
from tests import foreign, siglip, tiny
from tests.paths import GOLDENS

NONE = towers.Settings()


def _golden(which):
    with np.load(GOLDENS / f"big_vision_{which}.npz") as stored:
        return dict(stored)


def _params(golden):
    return {k: v for k, v in golden.items() if k.startswith("params/")}


@pytest.fixture(scope="module", params=["map", "tok"])
def converted(request, tmp_path_factory):
    """(kind of pooling, the golden, its model, its parameters)."""
    root, golden = tmp_path_factory.mktemp(request.param), _golden(request.param)
    np.savez(root / "m.npz", **_params(golden))
    assert from_big_vision(root / "m.npz", root / "ours", NONE).ok
    return request.param, golden, *saved_model.load_model(root / "ours")[:2]


def test_outputs_are_big_visions(converted):
    which, golden, model, params = converted
    theirs = golden["outputs/image_embed"], golden["outputs/text_embed"]
    foreign.close_to_ours(model, params, golden["inputs/image"], golden["inputs/text"], theirs)
    np.testing.assert_allclose(np.exp(params["logit_scale"]), golden["outputs/t"][0], rtol=1e-6)
    assert ("logit_bias" in params) == (which == "map")
    assert model.image.pool == {"map": "map", "tok": "class"}[which]
    assert model.image.projection == {"map": "none", "tok": "affine"}[which]
    assert (model.image.heads, model.text.pool, model.text.causal) == (2, "last", False)


def _stacked(params):
    """As big_vision's scan keeps layers."""
    out = {k: v for k, v in params.items() if "encoderblock_" not in k}
    for name in params:
        if "encoderblock_0" in name:
            other = name.replace("encoderblock_0", "encoderblock_1")
            out[name.replace("encoderblock_0", "encoderblock")] = np.stack(
                [params[name], params[other]]
            )
    return out


def _old_layout(params):
    """Positions and pooling head where older files have them; some positions added twice."""
    out = dict(params)
    out["params/img/Transformer/posembed_input/pos_embedding"] = out.pop("params/img/pos_embedding")
    out["params/txt/Encoder_0/pos_embedding"] = out["params/txt/pos_embedding"] * 0.25
    out["params/txt/pos_embedding"] = out["params/txt/pos_embedding"] * 0.75
    for name in list(out):
        if "/MAPHead_0/" in name:
            out[name.replace("/MAPHead_0/", "/")] = out.pop(name)
    return out


@pytest.mark.parametrize("change", [_stacked, _old_layout], ids=["scan", "old"])
def test_other_layouts_are_the_same_model(change, tmp_path):
    found = []
    for name, stored in (("a", _params(_golden("map"))), ("b", change(_params(_golden("map"))))):
        np.savez(tmp_path / f"{name}.npz", **stored)
        read = files.read(tmp_path / f"{name}.npz")
        image, text = (import_tower(which, read, NONE) for which in ("image", "text"))
        found.append(towers.two_tower_model(read.state, image, text, files.SCALARS))
    (one, a), (other, b) = found
    assert one == other
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def _image(path):
    """The arrays of the image tower in a file, by our names."""
    c = tiny.dictionary(init__image=str(path))
    c.model.image.update(siglip.IMAGE)
    c.model.image.update(image_size=32, patch_size=8, width=32, heads=2, mlp_dim=128, depth=2)
    c.model.image.class_token = "tok" in str(path)
    return initialise.load(config_lib.from_dict(c)).params


def test_a_position_of_the_class_token(tmp_path):
    params = _params(_golden("tok"))
    own = np.full((1, 1, 32), 0.5, np.float32)
    name = "params/img/pos_embedding"
    np.savez(tmp_path / "tok.npz", **params)
    assert not _image(tmp_path / "tok.npz:img")["image/position_embed"][0].any()
    np.savez(tmp_path / "tok.npz", **params | {name: np.concatenate([own, params[name]], axis=1)})
    positions = _image(tmp_path / "tok.npz:img")["image/position_embed"]
    np.testing.assert_array_equal(positions[0], own[0, 0])
    np.testing.assert_array_equal(positions[1:], params[name][0])


def test_subtree_and_bfloat16(tmp_path):
    params = {
        "opt/target" + k.removeprefix("params"): v.astype(jnp.dtype("bfloat16")).view("V2")
        for k, v in _params(_golden("map")).items()
    }
    np.savez(tmp_path / "m.npz", **params)
    path = f"{tmp_path}/m.npz:img"
    assert files.is_path(path) and not files.is_path(tmp_path / "m.pt")
    exact = _golden("map")["params/img/embedding/kernel"].reshape(-1, 32)
    np.testing.assert_allclose(_image(path)["image/patch_embed/kernel"], exact, rtol=2**-8)


@pytest.mark.parametrize(
    "change,path,message",
    [
        (lambda p: p.pop("params/img/embedding/kernel"), "", "img/embedding/kernel: missing"),
        (lambda p: p.pop("params/t"), "", "m.npz: t: missing; expected a model of two towers"),
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
    params = _params(_golden("map"))
    change(params)
    np.savez(tmp_path / "m.npz", **params)
    with pytest.raises(ConvertError) as error:
        from_big_vision(f"{tmp_path}/m.npz{path}", tmp_path / "ours", NONE)
    assert message in str(error.value) and "\n" not in str(error.value)
