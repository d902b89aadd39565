import sys
import types

import jax
import numpy as np
import pytest
import tensorflow as tf
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers

from grain_jax import inference
from grain_jax.core import images
from grain_jax.evaluate import big_vision
from grain_jax.runtime import checkpoint
from tests import perturbed

TEXTS = ["a wren", "a red kite with a long forked tail", "", "wren"]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def saved(folder, **changes):
    """A model's folder, with a tokenizer.json of ten words whose end token is not the highest id."""
    model = perturbed.tiny(image__depth=1, text__depth=1, **changes)
    checkpoint.save_model(folder, model, perturbed.params(model), source="test")
    words = "<unk> </s> a wren red kite with long forked tail".split()
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("clip") / "model", text__vocab_size=49408)


@pytest.fixture(scope="module", params=["packable", "sees its padding"])
def other(request, tmp_path_factory):
    changes = dict(text__tokenizer="tokenizer.json", text__pad_id=1)
    if request.param == "sees its padding":
        changes |= dict(text__causal=False, text__pool="last", decoder=None, image__pool="mean")
        changes |= dict(logit_bias_init=-10.0)
    return saved(tmp_path_factory.mktemp("other") / "model", **changes)


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
    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    zimg, ztxt, out = predict(state, {"image": pictures})
    assert ztxt is None and set(out) == {"img/normalized", "t", "t/parameter"}
    close(zimg, predictor.encode_image(pictures))
    close(out["t"], [np.exp(2.5)])
    ids = labels(clip)
    assert ids[0, :5].tolist() == [49406, 320, 31970, 49407, -1]
    assert (ids == -1).sum(axis=1).tolist()[::2] == [28, 30]
    zimg, ztxt, out = predict(state, {"labels": ids})
    assert zimg is None
    close(ztxt, predictor.encode_text(TEXTS))
    assert np.abs(ztxt[0] - ztxt[3]).max() > 0.01
    # CLIP's ids of another op, padded with its end token or with 0.
    for padding in (0, 49407):
        close(predict(state, {"labels": np.where(ids < 0, padding, ids)})[1], ztxt)
    for outside in (49408, 10**6, -2):  # ids that the table has not got
        wrong = np.where(np.arange(4)[:, None] == 1, outside, ids)
        found = np.asarray(predict(state, {"labels": wrong})[1])
        assert np.isnan(found).all(axis=1).tolist() == [False, True, False, False]


def test_texts_of_another_tokenizer(other):
    predict, state = made(other)
    ids = labels(other)
    assert ids[1, :9].tolist() == [2, 4, 5, 6, 2, 7, 8, 9, -1]
    _, ztxt, out = predict(state, {"labels": ids})
    predictor = inference.load(other)
    close(ztxt, predictor.encode_text(TEXTS))
    if predictor.model.logit_bias_init is not None:
        close(out["b"], [state["params"]["logit_bias"]])
        shorter = np.where(ids < 0, 1, ids)[
            :, :8
        ]  # as big_vision's own op gives: max_len, pad_value
        close(predict(state, {"labels": shorter})[1], ztxt)


def test_both_at_once_and_init_as_its_trainers_call_it(clip):
    model = big_vision.Model(checkpoint=clip)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), np.zeros((1, 40, 40, 3)), np.zeros((1, 32), np.int32)
    )
    params = big_vision.load(None, clip, {"checkpoint": clip})
    assert jax.tree.map(np.shape, shapes["params"]) == jax.tree.map(np.shape, params)
    pictures = np.zeros((2, 40, 40, 3), np.uint8)
    zimg, ztxt, out = jax.jit(model.apply)({"params": params}, pictures, labels(clip))
    assert zimg.shape == (2, 28) and ztxt.shape == (4, 28)
    close(out["img/normalized"], zimg)
    close(out["txt/normalized"], ztxt)


def test_pictures_are_resized_as_ours(clip):
    op = big_vision.grain_image(clip)
    picture = np.random.default_rng(1).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    png = tf.io.encode_png(picture).numpy()
    for given in (picture, png):
        dataset = tf.data.Dataset.from_tensors({"image": given, "label": 3}).map(op)
        assert dataset.element_spec["image"].shape == (40, 40, 3)
        (got,) = dataset.as_numpy_iterator()
        np.testing.assert_array_equal(got["image"], images.resize(picture, 40))
        assert got["label"] == 3


def test_register_needs_big_vision(monkeypatch):
    monkeypatch.setitem(sys.modules, "big_vision", None)
    said = "^big_vision: not on the path; clone github.com/google-research/big_vision and add"
    with pytest.raises(big_vision.BigVisionError, match=said):
        big_vision.register()


def test_register_makes_the_names_known(monkeypatch):
    known = {}

    class Registry:
        @staticmethod
        def register(name, replace=False):
            assert replace
            return lambda item: known.setdefault(name, item)

    for name in ("big_vision", "big_vision.pp"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    registry = types.SimpleNamespace(Registry=Registry)
    monkeypatch.setattr(sys.modules["big_vision.pp"], "registry", registry, raising=False)
    monkeypatch.setitem(sys.modules, "big_vision.models.grain_jax", None)
    big_vision.register()
    assert sys.modules["big_vision.models.grain_jax"] is big_vision
    assert known == {
        "preprocess_ops.grain_image": big_vision.grain_image,
        "preprocess_ops.grain_text": big_vision.grain_text,
    }


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda a, b: big_vision.Model(checkpoint=a).apply({}, None, None, train=True),
            "^train: this adapter evaluates",
        ),
        (
            lambda a, b: big_vision.load(None, {"img": a}, {"checkpoint": a}),
            "^model_init: got {'img'",
        ),
        (
            lambda a, b: big_vision.load(None, a, {"checkpoint": b}),
            "^model_init: .* has another model than model.checkpoint, ",
        ),
        (
            lambda a, b: big_vision.load(None, "none", {"checkpoint": a}),
            "none: no such folder",
        ),
    ],
)
def test_errors_are_one_line(clip, other, call, said):
    with pytest.raises(ValueError, match=said) as error:
        call(clip, other)
    assert "\n" not in str(error.value)
