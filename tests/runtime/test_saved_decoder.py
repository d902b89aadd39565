"""A text decoder on disk: of a run's checkpoint, of a converted folder, and through what makes folders of folders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.convert.__main__ import main
from grain_jax.models import grain
from grain_jax.runtime import checkpoint
from tests import perturbed, tiny
from tests.convert.test_average import run_with_factors
from tests.convert.test_pack import State
from tests.inference.test_text_decoder import random_decoder

SMALL = dict(image__depth=1, text__depth=1, decoder__depth=1)
TERM = {"term": "text_decoder", "weight": 1.0, "width": 24, "heads": 3, "bins": 10}
SIZES = config_lib.TextDecoder(width=24, heads=3, bins=10)


def write_run(root, terms, ema_decay=0.0, seed=0):
    """(the model, the decoders) of a checkpoint with random parameters of these entries of `loss.terms`."""
    c = tiny.dictionary(ema_decay=ema_decay)
    c.loss.terms.update(terms)
    model = perturbed.tiny(**SMALL)
    config = dataclasses.replace(config_lib.from_dict(c), model=model)
    decoders = {
        name: random_decoder(model, config_lib.text_decoder_of_term(entry, model), seed + i)
        for i, (name, entry) in enumerate(sorted(terms.items()))
    }
    of_terms = {name: {"decoder": x.params} for name, x in decoders.items()}
    params = jax.tree.map(jnp.asarray, perturbed.params(model) | {"terms": of_terms})
    average = jax.tree.map(lambda x: x + 1, params) if ema_decay else {}
    state = State(jnp.int32(1), params, {}, average)
    with checkpoint.manager(root, config) as checkpoints:
        checkpoint.save(checkpoints, state, config)
        checkpoints.wait_until_finished()
    return model, decoders


def equal(found, expected):
    expected = jax.tree_util.tree_leaves_with_path(expected)
    for x, (path, y) in zip(jax.tree.leaves(found), expected, strict=True):
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return str(root), *write_run(root, {"words": TERM})


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_decoder_of_a_run_is_that_of_its_term(run, tmp_path, ema_decay):
    root, model, decoders = run
    if ema_decay:
        root, (model, decoders) = tmp_path, write_run(tmp_path, {"words": TERM}, ema_decay)
    stored = checkpoint.load_stored(root)
    assert stored.text_decoder is not None
    assert stored.text_decoder.config == SIZES.beside(model)
    assert stored.text_decoder.config == SIZES.beside(model)
    sizes = stored.text_decoder.config
    assert (sizes.width, sizes.depth, sizes.heads, sizes.mlp_dim) == (24, 1, 3, 96)
    expected = decoders["words"].params
    equal(stored.text_decoder.params, jax.tree.map(lambda x: x + bool(ema_decay), expected))
    assert "terms" not in stored.params and len(checkpoint.load_model(root)) == 3


def test_of_several_the_first_by_name_is_read(tmp_path, caplog):
    _, decoders = write_run(tmp_path, {"b": TERM, "a": TERM | {"bins": 20}})
    stored = checkpoint.load_stored(tmp_path)
    assert "trained the text decoders a, b, reading the first" in caplog.text
    assert stored.text_decoder is not None and stored.text_decoder.config.bins == 20
    equal(stored.text_decoder.params, decoders["a"].params)


def test_a_folder_keeps_it_and_shows_damage(run, tmp_path):
    _, model, decoders = run
    decoder, params = decoders["words"], perturbed.params(model)
    checkpoint.save_model(tmp_path, model, params, decoder, source="test")
    stored = checkpoint.load_stored(tmp_path)
    assert stored.text_decoder is not None and stored.text_decoder.config == decoder.config
    equal(stored.text_decoder.params, decoder.params)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["text_decoder"]["depth"] == 1 and described["source"] == "test"
    described["text_decoder"]["heads"] = 4
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(checkpoint.CheckpointError, match="text_decoder: not what config.json has"):
        checkpoint.load_stored(tmp_path)
    other = decoder._replace(params=jax.tree.map(lambda x: x + 1, decoder.params))
    checkpoint.save_model(tmp_path / "other", model, params, other)
    (tmp_path / "text_decoder").rename(tmp_path / "before")
    (tmp_path / "other" / "text_decoder").rename(tmp_path / "text_decoder")
    described["text_decoder"]["heads"] = 3
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(checkpoint.CheckpointError, match="text_decoder: not what config.json has"):
        checkpoint.load_stored(tmp_path)
    checkpoint.save_model(tmp_path, model, params)  # in its place one without
    assert checkpoint.load_stored(tmp_path).text_decoder is None
    assert not (tmp_path / "text_decoder").exists()


def test_an_average_has_it_where_all_models_have_one(run, tmp_path, capsys):
    root, model, decoders = run
    write_run(tmp_path / "two", {"words": TERM}, seed=5)
    write_run(tmp_path / "three", {"words": TERM | {"bins": 11}})
    average = lambda out, *models: main(["average", *map(str, models), "--output", str(out)])
    (tmp_path / "two" / "rerank.json").write_text("{}")
    assert average(tmp_path / "mean", root, tmp_path / "two") == 0
    said = capsys.readouterr().out
    assert "text decoder: averaged" in said and "without a weight of reranking" in said
    assert not (tmp_path / "mean" / "rerank.json").exists()
    found = checkpoint.load_stored(tmp_path / "mean").text_decoder
    assert found is not None and found.config == decoders["words"].config
    other = checkpoint.load_stored(tmp_path / "two").text_decoder
    assert other is not None
    mean = jax.tree.map(lambda x, y: (x + y) / 2, decoders["words"].params, other.params)
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert average(tmp_path / "odd", root, tmp_path / "three") == 0
    said = capsys.readouterr().out
    assert "text decoder: left out, as not all models have one of the same sizes" in said
    stored = checkpoint.load_stored(tmp_path / "odd")
    assert stored.text_decoder is None and "text_decoder" not in grain.flat(stored.params)


def test_pack_rounds_it(run, tmp_path, capsys):
    root, model, decoders = run
    assert main(["pack", "--input", root, "--output", str(tmp_path)]) == 0
    assert "with the text decoder, rounded like them" in capsys.readouterr().out
    found = checkpoint.load_stored(tmp_path).text_decoder
    assert found is not None
    rounded = jax.tree.map(lambda x: np.float32(jnp.bfloat16(x)), decoders["words"].params)
    equal(found.params, rounded)


def test_merge_keeps_it(tmp_path, capsys):
    model = perturbed.tiny(image__depth=1, text__depth=1)
    decoder = random_decoder(model, SIZES)
    root = run_with_factors(tmp_path / "lora", model)
    stored = checkpoint.load_stored(root)
    assert stored.text_decoder is None
    with pytest.MonkeyPatch.context() as patch:
        with_one = stored._replace(text_decoder=decoder)
        patch.setattr(checkpoint, "load_stored", lambda _: with_one)
        assert main(["merge", "--checkpoint", root, "--output", str(tmp_path / "merged")]) == 0
    found = checkpoint.load_stored(tmp_path / "merged").text_decoder
    assert found is not None and found.config == decoder.config
    equal(found.params, decoder.params)
