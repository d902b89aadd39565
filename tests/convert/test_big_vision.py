"""from-big-vision against what big_vision itself gave (goldens/big_vision_*.npz), and what it says of faults."""

import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.config import recipe
from grain_jax.convert import initialise, tables, towers
from grain_jax.convert.big_vision import checkpoint as files
from grain_jax.convert.big_vision.command import from_big_vision
from grain_jax.convert.big_vision.towers import image_rows, text_rows
from grain_jax.convert.faults import ConvertError
from grain_jax.models import grain
from grain_jax.runtime import checkpoint
from tests import foreign, tiny
from tests.paths import GOLDENS

NONE = towers.Settings()


def _golden(which):
    with np.load(GOLDENS / f"big_vision_{which}.npz") as stored:
        return dict(stored)


def _params(golden):
    return {k: v for k, v in golden.items() if k.startswith("params/")}


@pytest.mark.parametrize("which", ["map", "tok"])
def test_outputs_are_big_visions(which, tmp_path):
    golden = _golden(which)
    np.savez(tmp_path / "m.npz", **_params(golden))
    report = from_big_vision(tmp_path / "m.npz", tmp_path / "ours", NONE)
    assert report.ok
    model, params, _ = checkpoint.load_model(tmp_path / "ours")
    ours = foreign.outputs_of_ours(model, params, golden["inputs/image"], golden["inputs/text"])
    foreign.close(ours[0], golden["outputs/image_embed"])
    foreign.close(ours[1], golden["outputs/text_embed"])
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
    params = _params(_golden("map"))
    found = []
    for name, stored in (("a", params), ("b", change(params))):
        np.savez(tmp_path / f"{name}.npz", **stored)
        from_big_vision(tmp_path / f"{name}.npz", tmp_path / name, NONE)
        model, params_, _ = checkpoint.load_model(tmp_path / name)
        found.append((model, grain.flat(params_)))
    (one, a), (other, b) = found
    assert one == other and a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-6, err_msg=name)


def _image(path):
    """The arrays of the image tower in a file, by our names."""
    c = tiny.dictionary(init__image=str(path))
    recipe.towers_of(c, "siglip", ("image",))
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
    import jax.numpy as jnp

    params = {
        "opt/target" + k.removeprefix("params"): v.astype(jnp.dtype("bfloat16")).view("V2")
        for k, v in _params(_golden("map")).items()
    }
    np.savez(tmp_path / "m.npz", **params)
    path = f"{tmp_path}/m.npz:img"
    assert files.is_path(path) and not files.is_path(tmp_path / "m.pt")
    exact = _golden("map")["params/img/embedding/kernel"].reshape(-1, 32)
    np.testing.assert_allclose(_image(path)["image/patch_embed/kernel"], exact, rtol=2**-8)


@pytest.mark.parametrize("which", ["map", "tok"])
def test_the_tables_serve_both_directions(which, tmp_path):
    params = _params(_golden(which))
    np.savez(tmp_path / "m.npz", **params)
    from_big_vision(tmp_path / "m.npz", tmp_path / "ours", NONE)
    ours = grain.flat(checkpoint.load_model(tmp_path / "ours")[1])
    for prefix, rows in (("img", image_rows()), ("txt", text_rows())):
        for name, array in tables.write(rows, ours).items():
            stored = params[f"params/{prefix}/{name}"]
            if array.shape != stored.shape:  # with a position of zeros for the class token
                array = array[:, 1:]
            np.testing.assert_array_equal(array, stored, err_msg=name)


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
        (
            lambda p: p.pop("params/txt/Encoder_0/encoderblock_0/LayerNorm_0/bias"),
            "",
            "txt/Encoder_0/encoderblock_0/LayerNorm_0/bias: missing",
        ),
        (lambda p: None, ":image", "no sub-tree 'image'; there are: b, img, t, txt"),
    ],
)
def test_faults_are_one_line_each(change, path, message, tmp_path):
    params = _params(_golden("map"))
    change(params)
    np.savez(tmp_path / "m.npz", **params)
    with pytest.raises(ConvertError) as error:
        from_big_vision(f"{tmp_path}/m.npz{path}", tmp_path / "ours", NONE)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    for name, said in (
        ("cut.npz", "not a .npz of plain arrays"),
        ("objects.npz", "a: got object, expected an array of numbers"),
    ):
        with pytest.raises(ConvertError, match=said):
            files.read(tmp_path / name)
    with pytest.raises(ConvertError, match="none.npz: no such file"):
        files.read(tmp_path / "none.npz:img")
