"""`convert average`: WiSE-FT and soups, against sums in float64; models that are not equal are refused."""

import jax
import numpy as np
import pytest

import grain_jax
from grain_jax.checkpoint import saved_model
from grain_jax.convert.__main__ import main
from grain_jax.models import grain
from tests import perturbed

DEPTH = dict(image__depth=1, text__depth=1)


def _save(path, seed=0, **changes):
    """A model with random weights of that seed."""
    model = perturbed.tiny(**DEPTH, **changes)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: np.float32(x + rng.normal(0, 0.1, np.shape(x))), perturbed.params(model))
    saved_model.save_model(path, model, params, source="test")
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [_save(root / str(seed), seed) for seed in range(3)]


def _flat(path):
    return grain.flat(saved_model.load_model(path)[1])


def _average(path, *arguments):
    return main(["average", *arguments, "--output", str(path)])


def test_a_soup_is_the_sum(models, tmp_path, capsys):
    weights = (0.5, 0.2, 0.3)
    assert _average(tmp_path / "soup", *models, "--weights", "0.5,0.2,0.3") == 0
    said = capsys.readouterr().out
    for weight, model in zip(weights, models):
        assert f"{weight:10.6g}  {model}" in said
    got, inputs = _flat(tmp_path / "soup"), [_flat(model) for model in models]
    for name, x in got.items():
        expected = sum(w * arrays[name].astype(np.float64) for w, arrays in zip(weights, inputs))
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    scale = np.exp(sum(w * float(arrays["logit_scale"]) for w, arrays in zip(weights, inputs)))
    assert grain_jax.load(tmp_path / "soup").logit_scale == pytest.approx(scale, rel=1e-6)
    assert _average(tmp_path / "end", *models[:2], "--weights=0,1") == 0
    assert _average(tmp_path / "mean", *models[:2]) == 0
    end, mean = _flat(tmp_path / "end"), _flat(tmp_path / "mean")
    for name, x in inputs[1].items():
        np.testing.assert_array_equal(end[name], x, err_msg=name)
        np.testing.assert_allclose(mean[name], (inputs[0][name] + x) / 2, atol=1e-6, err_msg=name)


def test_models_that_differ_are_refused_with_a_line_a_difference(models, tmp_path, capsys):
    other = _save(tmp_path / "other", image__activation="gelu_tanh", text__width=45)
    bare = _save(tmp_path / "bare", decoder=None, image__pool="map")
    for model, keys in (
        (other, ["image.activation: got 'gelu_tanh'", "text.width: got 45, expected 40"]),
        (bare, ["image.pool: got 'map'", "decoder.width: got None, expected 36"]),
    ):
        assert _average(tmp_path / "out", models[0], model) == 2
        said = capsys.readouterr().err.splitlines()
        for key in keys:
            assert any(line.startswith(f"{model}: model.{key}") for line in said), said
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_another_model(tmp_path, capsys):
    folders = []
    for name, vocabulary in (("a", "[UNK] a b"), ("b", "[UNK] a b"), ("c", "[UNK] b a")):
        folders.append(_save(tmp_path / name, text__tokenizer="tokenizer.json"))
        perturbed.write_words(tmp_path / name, vocabulary)
    assert _average(tmp_path / "out", *folders[:2]) == 0
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()
    capsys.readouterr()
    assert _average(tmp_path / "no", *folders[1:]) == 2
    said = capsys.readouterr().err
    assert "model.text.tokenizer: got 'tokenizer.json, sha256 " in said and "2 faults" not in said


@pytest.mark.parametrize(
    "arguments,line",
    [
        (["{0}", "{1}", "--weights", "1"], "--weights: got 1 for 2 models"),
        (["{0}", "{1}", "--weights", "0.5,0.6"], "for 2 models with the sum 1.1"),
        (["{0}", "{1}", "--weights", "nan,1"], "--weights: got 'nan,1', expected numbers"),
        (["{0}", "nowhere", "--weights", "-1,2"], "nowhere"),
    ],
)
def test_wrong_usage_is_one_line(models, arguments, line, tmp_path, capsys):
    assert _average(tmp_path / "out", *(word.format(*models) for word in arguments)) == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) <= 2
    assert not (tmp_path / "out").exists()
