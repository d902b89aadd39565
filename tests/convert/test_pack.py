"""`convert pack`: a small copy of a model, in bfloat16 and without tokens that training never met."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grain_jax
from grain_jax.checkpoint import files, saved_model, states
from grain_jax.convert.__main__ import main
from grain_jax.convert.pack import pack
from grain_jax.train import optim
from tests import perturbed, tiny

MET = [*range(100), 298, 299]  # tokens of training; the last two start and end a text


class State(NamedTuple):
    """What `save` needs of a TrainState."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema_params: Any = ()


def _moments(path, x):
    """Ones after a gradient, zeros in rows of the embedding that had none."""
    moments = np.ones(x.shape, x.dtype)
    if jax.tree_util.keystr(path).endswith("['token_embed']['embedding']"):
        moments[[i for i in range(300) if i not in MET]] = 0
    return jnp.asarray(moments)


def _run(root, end_id=None, **changes):
    """A checkpoint whose moments are those after a gradient in the embeddings of MET alone."""
    model = perturbed.tiny(text__end_id=end_id)
    config = dataclasses.replace(tiny.config(**changes), model=model)
    params = jax.tree.map(jnp.asarray, perturbed.params(model))
    adamw = optim.optimizer(config.optim, optax.constant_schedule(1e-3))
    opt_state = jax.tree_util.tree_map_with_path(_moments, jax.eval_shape(adamw.init, params))
    state = State(jnp.int32(1), params, opt_state)
    with states.Checkpoints(root, config) as checkpoints:
        checkpoints.save(state)
    return root


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("run"))


def test_a_checkpoint_loses_the_tokens_that_training_never_met(workdir, tmp_path, capsys):
    assert main(["pack", "--input", str(workdir), "--output", str(tmp_path / "small")]) == 0
    said = capsys.readouterr().out
    assert "102 of 300 tokens were trained; the embeddings of the others are zeros" in said
    assert said.rstrip().endswith("parity: PROVEN")
    stored = files.read_arrays(tmp_path / "small" / "params")
    assert {str(x.dtype) for x in jax.tree.leaves(stored)} == {"bfloat16"}
    _, params, _ = saved_model.load_model(workdir)
    small = grain_jax.load(tmp_path / "small").params
    params["text"]["token_embed"]["embedding"][100:298] = 0
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(small)):
        expected = np.asarray(x, jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(y, expected, err_msg=jax.tree_util.keystr(path))
        assert y.dtype == np.float32


@pytest.mark.parametrize("source", ["a run from another text tower", "a converted folder"])
def test_all_tokens_are_kept(source, workdir, tmp_path):
    """Those that training never met are no random numbers, or nothing tells which they are."""
    model, params, _ = saved_model.load_model(workdir)
    if source == "a converted folder":
        saved_model.save_model(tmp_path / "ours", model, params)
    else:
        _run(tmp_path / "ours", init__text="clip.pt")
    report = pack(tmp_path / "ours", tmp_path / "small")
    assert "300 of 300 tokens" in report.text and report.ok
    embedding = params["text"]["token_embed"]["embedding"]
    packed = grain_jax.load(tmp_path / "small").params["text"]["token_embed"]["embedding"]
    np.testing.assert_array_equal(packed, np.asarray(embedding, jnp.bfloat16).astype(np.float32))
    again = pack(tmp_path / "small", tmp_path / "again")  # bfloat16 already
    assert {comparison.error for comparison in again.comparisons} == {0.0}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["parity"] == "PROVEN"


def test_texts_keep_the_id_that_ends_them_and_their_tokenizer(tmp_path):
    assert pack(_run(tmp_path / "run", end_id=2), tmp_path / "small").ok
    model = perturbed.tiny(text__tokenizer=str(tmp_path / "ours" / "tokenizer.json"))
    saved_model.save_model(tmp_path / "ours", model, perturbed.params(model))
    perturbed.write_words(tmp_path / "ours", "unknown pad a photo")
    assert pack(tmp_path / "ours", tmp_path / "again").ok
    assert grain_jax.load(tmp_path / "again").model.text.tokenizer == "tokenizer.json"
    assert (tmp_path / "again" / "tokenizer.json").exists()
