"""`convert average`: WiSE-FT and soups, against sums in float64; models that are not equal are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grain_jax
from grain_jax.checkpoint import saved_model, states
from grain_jax.convert import parity
from grain_jax.convert.__main__ import main
from grain_jax.core import low_rank
from grain_jax.models import grain, lora
from grain_jax.train import sharding
from tests import perturbed, tiny
from tests.convert.test_pack import State

DEPTH = dict(image__depth=1, text__depth=1)


def _save(path, seed=0, **changes):
    """A model with random weights of that seed."""
    model = perturbed.tiny(**DEPTH, **changes)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: np.float32(x + rng.normal(0, 0.1, np.shape(x))), perturbed.params(model)
    )
    saved_model.save_model(path, model, params, source="test")
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [_save(root / str(seed), seed) for seed in range(3)]


def run_with_factors(root, model):
    """A checkpoint of a run of that model with LoRA, its weights random, of which every one counts."""
    fits = dict(
        optim__lora__rank=3,
        optim__lora__alpha=4.5,
        loss__contrast="softmax" if model.logit_bias_init is None else "sigmoid",
        loss__box_description=float(model.boxes.kind != "none"),
        text__packing=model.text.packable,
        input__max_regions=5 if model.decoder else 0,
    )
    base = dict(model__boxes__kind=model.boxes.kind, model__logit_bias_init=model.logit_bias_init)
    config = dataclasses.replace(tiny.config(**fits, **base), model=model)
    shapes = sharding.unbox(jax.eval_shape(lambda: lora.init(grain.GRAIN(model), config)))
    weights, rng = grain.flat(perturbed.params(model)), np.random.default_rng(5)

    def draw(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.asarray(weights.get(name, np.float32(rng.normal(0, 0.2, x.shape))))

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    state = State(jnp.int32(1), params, {})
    with states.Checkpoints(root, config) as checkpoints:
        checkpoints.save(state)
    return str(root)


@pytest.fixture(scope="module")
def with_factors(tmp_path_factory):
    return run_with_factors(tmp_path_factory.mktemp("lora"), perturbed.tiny(**DEPTH))


def _flat(path):
    return grain.flat(saved_model.load_model(path)[1])


def _average(path, *words):
    return main(["average", *words, "--output", str(path)])


def test_a_soup_is_the_sum_and_the_same_bits_again(models, tmp_path, capsys):
    weights = (0.5, 0.2, 0.3)
    assert _average(tmp_path / "soup", *models, "--weights", "0.5,0.2,0.3") == 0
    said = capsys.readouterr().out
    for weight, model in zip(weights, models):
        assert f"{weight:10.6g}  {model}, logit scale " in said
    got, inputs = _flat(tmp_path / "soup"), [_flat(model) for model in models]
    for name, x in got.items():
        expected = sum(w * one[name].astype(np.float64) for w, one in zip(weights, inputs))
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    scale = np.exp(sum(w * float(one["logit_scale"]) for w, one in zip(weights, inputs)))
    assert grain_jax.load(tmp_path / "soup").logit_scale == pytest.approx(scale, rel=1e-6)
    assert _average(tmp_path / "again", *models, "--weights=0.5,0.2,0.3") == 0
    for name, x in _flat(tmp_path / "again").items():
        np.testing.assert_array_equal(x, got[name], err_msg=name)


def test_the_ends_are_the_models_and_equal_weights_are_the_default(models, tmp_path):
    assert _average(tmp_path / "end", *models[:2], "--weights", "0,1") == 0
    assert _average(tmp_path / "mean", *models[:2]) == 0
    one, two = (_flat(model) for model in models[:2])
    end, mean = _flat(tmp_path / "end"), _flat(tmp_path / "mean")
    for name in one:
        np.testing.assert_array_equal(end[name], two[name], err_msg=name)
        np.testing.assert_allclose(mean[name], (one[name] + two[name]) / 2, atol=1e-6, err_msg=name)


def test_factors_are_folded_in_first(models, with_factors, tmp_path, capsys):
    stored = saved_model.load_stored(with_factors)
    assert len(list(low_rank.maps_in(stored.params))) == 12
    assert _average(tmp_path / "wise", with_factors, models[0], "--weights", "0.25,0.75") == 0
    assert "LoRA of rank 3 folded in" in capsys.readouterr().out
    raw, start, got = grain.flat(stored.params), _flat(models[0]), _flat(tmp_path / "wise")
    name = "text/blocks/attention/out"
    kernel, a, b = (raw[f"{name}/{x}"].astype(np.float64) for x in ("kernel", "lora_a", "lora_b"))
    merged = kernel + 1.5 * np.einsum("lhdr,lrw->lhdw", a, b)
    expected = 0.25 * merged + 0.75 * start[f"{name}/kernel"]
    np.testing.assert_allclose(got[f"{name}/kernel"], expected, rtol=1e-6, atol=1e-6)
    assert got.keys() == start.keys()


def test_transformers_computes_what_the_factors_beside_their_matrices_do(tmp_path, capsys):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    clip = dict(image__pool="class", image__qk_norm=False, image__pre_norm=True)
    model = perturbed.tiny(decoder=None, **clip, **DEPTH)
    run = run_with_factors(tmp_path / "run", model)
    assert main(["to-hf", "--checkpoint", run, "--output", str(tmp_path / "hf")]) == 0
    assert "parity: PROVEN" in capsys.readouterr().out
    stored, given = saved_model.load_stored(run), parity.inputs_of(model)
    with lora.beside(stored.lora):
        ours = parity.outputs(model, stored.params, given)
    module = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    ids = np.where(given.token_ids == 0, 299, given.token_ids)  # the end token pads there
    with torch.no_grad():
        pixels = torch.tensor(given.images.transpose(0, 3, 1, 2))
        out = module(input_ids=torch.tensor(ids), pixel_values=pixels)
    for a, b in ((ours["image_embed"], out.image_embeds), (ours["text_embed"], out.text_embeds)):
        assert np.abs(a - b.numpy()).max() < 1e-5 * np.abs(a).max()


def test_models_that_differ_are_refused_with_a_line_a_difference(models, tmp_path, capsys):
    other = _save(tmp_path / "other", image__activation="gelu_tanh", text__width=45)
    bare = _save(tmp_path / "bare", decoder=None, image__pool="map")
    assert _average(tmp_path / "out", models[0], other) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(
        f"{other}: model.image.activation: got 'gelu_tanh', expected 'gelu' as"
    )
    assert said[1].startswith(f"{other}: model.text.width: got 45, expected 40 as {models[0]} has")
    assert said[2:] == ["2 faults; nothing was written"]
    assert _average(tmp_path / "out", models[0], bare) == 2
    said = capsys.readouterr().err.splitlines()
    assert f"{bare}: model.decoder: got None, expected 'one' as {models[0]} has" in said
    assert len(said) == 3 and not (tmp_path / "out").exists()


def test_a_model_whose_arrays_are_not_those_of_its_config_is_refused(models, tmp_path, capsys):
    """Without digests, as of a config.json that a hand wrote: one array is missing, two have another shape or name."""
    model, params, _ = saved_model.load_model(models[0])
    norm = params["text_norm"]
    norm["more"], norm["scale"] = norm.pop("bias"), norm["scale"][:1]
    saved_model.save_model(tmp_path / "odd", model, params)
    config = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps({"model": config["model"]}))
    assert _average(tmp_path / "out", models[0], str(tmp_path / "odd")) == 2
    at = f"{tmp_path / 'odd'}: text_norm/"
    assert capsys.readouterr().err.splitlines() == [
        f"{at}bias: got none, expected (40,) as its config says",
        f"{at}scale: got (1,), expected (40,) as its config says",
        f"{at}more: got (40,), expected none as its config says",
        "3 faults; nothing was written",
    ]
    assert not (tmp_path / "out").exists()


def test_factors_in_a_converted_folder_are_refused(with_factors, tmp_path, capsys):
    stored = saved_model.load_stored(with_factors)
    saved_model.save_model(tmp_path / "apart", stored.model, stored.params)
    at, out = str(tmp_path / "apart"), str(tmp_path / "out")
    for words in (["average", at, at], ["to-hf", "--checkpoint", at]):
        assert main([*words, "--output", out]) == 2
        told = capsys.readouterr().err
        assert "apart: image/blocks/attention/key has factors of LoRA, whose scale" in told
        assert len(told.splitlines()) <= 2 and "damaged" not in told


def test_another_tokenizer_is_another_model(tmp_path, capsys):
    folders = []
    for name, words in (("a", "[UNK] a b"), ("b", "[UNK] a b"), ("c", "[UNK] b a")):
        folders.append(_save(tmp_path / name, text__tokenizer="tokenizer.json"))
        perturbed.write_words(tmp_path / name, words)
    assert _average(tmp_path / "out", *folders[:2]) == 0
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (
        tmp_path / "a/tokenizer.json"
    ).read_bytes()
    capsys.readouterr()
    assert _average(tmp_path / "no", *folders[1:]) == 2
    told = capsys.readouterr().err
    assert "model.text.tokenizer: got 'tokenizer.json, sha256 " in told and "2 faults" not in told


@pytest.mark.parametrize(
    "words,line",
    [
        (["{0}"], "models: got 1, expected two or more to average"),
        (["{0}", "{1}", "--weights", "1"], "--weights: got 1 for 2 models, expected one a model"),
        (["{0}", "{1}", "--weights", "0.5,0.6"], "--weights: got the sum 1.1, expected 1"),
        (["{0}", "{1}", "--weights", "nan,1"], "--weights: got 'nan,1', expected numbers"),
        (["{0}", "nowhere", "--weights", "-1,2"], "nowhere"),
    ],
)
def test_wrong_usage_is_one_line(models, words, line, tmp_path, capsys):
    assert _average(tmp_path / "out", *(word.format(*models) for word in words)) == 2
    told = capsys.readouterr().err
    assert line in told and len(told.splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_a_sum_that_is_not_finite_is_refused(models, tmp_path, capsys):
    model, params, _ = saved_model.load_model(models[0])
    params["text_norm"]["bias"][3] = np.nan
    saved_model.save_model(tmp_path / "nan", model, params)
    assert _average(tmp_path / "out", models[0], str(tmp_path / "nan")) == 2
    assert "text_norm/bias: the sum is not finite" in capsys.readouterr().err
