import sys
import types

import jax
import numpy as np
import pytest
import tensorflow as tf

from grain_jax import inference
from grain_jax.core import images, schema
from grain_jax.evaluate import big_vision
from tests import perturbed

TEXTS = ["a wren", "a red kite with a long forked tail", "", "wren"]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@pytest.fixture(scope="module", params=perturbed.REGIONS)
def clip(request, tmp_path_factory):
    changes = dict(text__vocab_size=49408, **perturbed.REGIONS[request.param])
    return perturbed.saved(tmp_path_factory.mktemp("clip") / "model", **changes)


@pytest.fixture(scope="module", params=["packable", "sees its padding", "masks its padding"])
def other(request, tmp_path_factory):
    changes = dict(text__tokenizer="tokenizer.json", text__pad_id=1)
    if request.param == "sees its padding":
        changes |= dict(text__causal=False, text__pool="last", decoder=None, image__pool="mean")
        changes |= dict(logit_bias_init=-10.0)
    if request.param == "masks its padding":
        changes |= dict(text__causal=False, text__mask_padding=True)
    folder = tmp_path_factory.mktemp("other") / "model"
    perturbed.saved(folder, **changes)
    # The end token is not the highest id.
    perturbed.write_words(folder, "<unk> </s> a wren red kite with long forked tail")
    return str(folder)


def made(folder):
    model = big_vision.Model(checkpoint=folder)
    params = big_vision.load(None, folder, {"checkpoint": folder})
    return jax.jit(big_vision.predict_fn(model)), {"params": params}


def labels(folder):
    """TEXTS as the op makes ids of them."""
    op = big_vision.grain_text(folder)
    dataset = tf.data.Dataset.from_tensor_slices({"texts": TEXTS, "id": range(len(TEXTS))}).map(op)
    assert dataset.element_spec["labels"] == tf.TensorSpec((32,), tf.int32)
    batch = next(dataset.batch(len(TEXTS)).as_numpy_iterator())
    assert batch["id"].tolist() == [0, 1, 2, 3]
    return batch["labels"]


def test_pictures_and_texts_as_the_predictor_has_them(clip):
    predict, state = made(clip)
    predictor = inference.load(clip)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3)).astype(np.uint8)
    ids = labels(clip)
    assert ids[0, :5].tolist() == [49406, 320, 31970, 49407, -1]
    assert (ids == -1).sum(axis=1).tolist()[::2] == [28, 30]
    text_of = lambda ids: predict(state, {"image": pictures, "labels": ids})[1]
    zimg, ztxt, out = predict(state, {"image": pictures, "labels": ids})
    close(zimg, predictor.encode_image(pictures))
    close(ztxt, predictor.encode_text(TEXTS))
    close(out["img/normalized"], zimg)
    close(out["txt/normalized"], ztxt)
    close(out["t"], [np.exp(2.5)])
    for name, expected in predictor.encode_regions(pictures)._asdict().items():
        close(out[f"regions/{name}"], expected)
    assert out["regions/prior"].any() == predictor.has_proposals
    regions = [np.asarray(out[f"regions/{name}"]) for name in schema.Regions._fields]
    perturbed.same_detections(predictor, predictor.detect(pictures, TEXTS[:2]), *regions, ztxt[:2])
    assert np.abs(ztxt[0] - ztxt[3]).max() > 0.01
    # CLIP's ids of another op, padded with its end token or with 0.
    for padding in (0, 49407):
        close(text_of(np.where(ids < 0, padding, ids)), ztxt)
    for outside in (49408, 10**6, -2):  # ids that the table has not got
        measured = np.asarray(text_of(np.where(np.arange(4)[:, None] == 1, outside, ids)))
        assert np.isnan(measured).all(axis=1).tolist() == [False, True, False, False]
    # Either alone, and init as its trainers call it.
    zimg, ztxt, out = jax.eval_shape(predict, state, {"image": pictures})
    names = {f"regions/{name}" for name in schema.Regions._fields} | {"img/normalized", "t", "t/parameter"}
    assert (zimg.shape, ztxt, set(out)) == ((4, 28), None, names)
    assert jax.eval_shape(predict, state, {"labels": ids})[0] is None
    model = big_vision.Model(checkpoint=clip)
    passed = np.zeros((1, 40, 40, 3)), np.zeros((1, 32), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *passed)
    assert jax.tree.map(np.shape, shapes["params"]) == jax.tree.map(np.shape, state["params"])


def test_texts_of_another_tokenizer(other):
    predict, state = made(other)
    ids = labels(other)
    assert ids[1, :9].tolist() == [2, 4, 5, 6, 2, 7, 8, 9, -1]
    _, ztxt, out = predict(state, {"labels": ids})
    predictor = inference.load(other)
    close(ztxt, predictor.encode_text(TEXTS))
    if predictor.model.logit_bias_init is not None:
        close(out["b"], [state["params"]["logit_bias"]])
        shorter = np.where(ids < 0, 1, ids)[:, :8]  # as big_vision's own op gives
        close(predict(state, {"labels": shorter})[1], ztxt)


def test_a_text_ends_at_its_end_token_whatever_pads_it(tmp_path):
    changes: dict = dict(text__tokenizer="tokenizer.json", text__pad_id=1, text__end_id=9, text__causal=False)
    perturbed.saved(tmp_path, **changes, text__mask_padding=True)
    predict, state = made(str(tmp_path))
    ids = np.array([[2, 4, 9, *[-1] * 29]], np.int32)
    padded = predict(state, {"labels": np.where(ids < 0, 1, ids)})[1]
    close(padded, predict(state, {"labels": ids})[1])


def test_pictures_are_resized_as_ours(clip):
    op = big_vision.grain_image(clip)
    picture = np.random.default_rng(1).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    png = tf.io.encode_png(picture).numpy()
    for options in (picture, png):
        dataset = tf.data.Dataset.from_tensors({"image": options, "label": 3}).map(op)
        assert dataset.element_spec["image"].shape == (40, 40, 3)
        (got,) = dataset.as_numpy_iterator()
        np.testing.assert_array_equal(got["image"], images.resize(picture, 40))
        assert got["label"] == 3


@pytest.mark.quick
def test_register_makes_the_names_known(monkeypatch):
    known = {}
    register = lambda name, replace: lambda item: known.setdefault(name, item)
    registry = types.SimpleNamespace(Registry=types.SimpleNamespace(register=register))
    for name in ("big_vision", "big_vision.pp"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["big_vision.pp"], "registry", registry, raising=False)
    monkeypatch.setitem(sys.modules, "big_vision.models.grain_jax", None)
    big_vision.register()
    assert sys.modules["big_vision.models.grain_jax"] is big_vision
    ops = dict(grain_image=big_vision.grain_image, grain_text=big_vision.grain_text)
    assert known == {f"preprocess_ops.{name}": op for name, op in ops.items()}
