"""The text decoder within training: exact in micro-batches and on every mesh; a head on a finished model."""

import functools
import re
import shutil

import jax
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax import train
from grain_jax.configs import text_decoder as recipe
from grain_jax.convert import initialise, tables
from grain_jax.core import errors
from grain_jax.input_pipeline import clip_tokenizer
from grain_jax.losses import total
from grain_jax.models import grain, text_decoder
from grain_jax.runtime import checkpoint
from grain_jax.terms.text_decoder import Options, draw
from grain_jax.training import flops, sharding, train_step
from tests import runs, tiny
from tests.terms import fake, test_runs

SIZES = dict(width=24, depth=1, heads=2, mlp_dim=32, bins=10, row_length=40)
WORDS = dict(
    term="text_decoder", weight=1.0, parallel_rate=0.5, label_smoothing=0.1, group=2, **SIZES
)


def config(mesh=(1, 1, 1), words=WORDS, **changes):
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh))
    changes = dict(model__text__vocab_size=600, optim__clip_norm=0.0, **sizes) | changes
    c = tiny.dictionary(**test_runs.TWO, **changes)
    c.loss.terms.words = dict(words)
    return config_lib.from_dict(c)


def program_of(c, mesh):
    devices = sharding.make_mesh(c.mesh, jax.devices()[: int(np.prod(mesh))])
    return train_step.build(c, devices, total_steps=c.total_steps, steps_per_epoch=1)


@functools.cache
def run(mesh=(1, 1, 1), **changes):
    """(metrics of two steps, how the parameters moved in them, the gradient of the first)."""
    c = config(mesh, input__captions_per_image=2, **changes)
    program = program_of(c, mesh)
    drawn = tiny.state(program)
    state = jax.device_put(drawn, program.shardings)
    batch = jax.device_put(tiny.batch(c), program.batch_sharding)
    metrics, gradient = [], None
    for _ in range(2):
        state, found = program.step(state, batch)
        metrics.append(jax.tree.map(float, found))
        if gradient is None:
            of = lambda m: np.asarray(m) / (1 - c.optim.b1)
            gradient = jax.tree.map(of, state.opt_state[1].mu)
    moved = jax.tree.map(np.subtract, jax.device_get(state.params), drawn.params)
    return metrics, grain.flat(moved), gradient


@pytest.mark.parametrize(
    "mesh,changes",
    [
        ((2, 2, 2), {"microbatches": 2}),
        pytest.param((1, 1, 1), {"microbatches": 4, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param((2, 1, 1), {}, marks=pytest.mark.slow),
    ],
)
def test_meshes_and_micro_batches_change_nothing(mesh, changes):
    """With dropout, a share of captions in parallel, smoothing, and two captions an image."""
    expected, moved, gradient = run()
    metrics, other, other_gradient = run(mesh, **changes)
    for a, b in zip(expected, metrics, strict=True):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=3e-5, atol=1e-6, err_msg=name)
    for name, a in grain.flat(gradient).items():
        b = grain.flat(other_gradient)[name]
        assert np.abs(a - b).max() / max(np.abs(a).max(), 1e-2) < 3e-5, name
    # Softmax does not see biases of keys: Adam makes a step of the rounding of their gradients.
    seen = [n for n, x in grain.flat(gradient).items() if not re.search(r"key(_norm)?/bias$", n)]
    apart = {n: np.linalg.norm(other[n] - moved[n]) / np.linalg.norm(moved[n]) for n in seen}
    assert max(apart.values()) < 0.02, apart


def test_what_a_step_measures_and_trains():
    metrics, _, gradient = run()
    names = {*text_decoder.TASKS, "filled", "left_out", "needed", "predicted"}
    names |= {f"{x}_accuracy" for x in text_decoder.TASKS} | {
        "caption_parallel",
        "caption_parallel_accuracy",
    }
    assert {x.removeprefix("words/") for x in metrics[0] if x.startswith("words/")} == names
    assert metrics[0]["grad_norm/terms"] > 0 and 0 < metrics[0]["words/filled"] < 1
    own = grain.flat(gradient["terms"])
    assert {name.split("/")[:2][1] for name in own} == {"decoder"}
    for name, x in own.items():
        # The key of a token shifts all logits of a query alike: softmax does not see its bias.
        assert np.abs(x).max() > 0 or name.endswith("key/bias"), name


def test_a_mesh_that_does_not_divide_the_heads_is_named():
    with pytest.raises(sharding.ShardingError, match="terms/words/decoder/blocks/") as error:
        program_of(config((1, 1, 4)), (1, 1, 4))
    assert "heads" in str(error.value)


@pytest.mark.parametrize(
    "changes,leading",
    [
        (dict(text__pack_group=1, text__pack_rows=4), 1),
        (dict(text__packing=False, model__text__causal=False, model__text__pool="last"), 0),
        (dict(input__max_regions=0), 1),
        (dict(input__captions_per_image=2), 1),
    ],
)
def test_captions_are_read_from_every_layout_of_texts(changes, leading):
    c = config(**changes)
    seen, options = fake.seen(c), Options(**SIZES, leading_specials=leading, describe_weight=0)
    batch = seen.batch._replace(texts_dropped=np.zeros_like(seen.batch.texts_dropped))
    seen = seen._replace(batch=batch)
    words = text_decoder.vocabulary(options, c.model)
    run = lambda batch, keys: draw(options, words, seen._replace(batch=batch, keys=keys))
    found = jax.jit(run)(batch, seen.keys)
    groups = len(batch.text_tokens)
    for i, mask in enumerate(batch.caption_mask):
        at = np.flatnonzero(
            np.asarray(found.rows.task[i] == 0) & np.asarray(found.rows.predicted[i])
        )
        assert bool(len(at)) == mask.any()
        texts = [
            batch.text_tokens[i * groups // len(batch.image), row, end - 6 + leading : end]
            for row, end in batch.caption_at[i][mask]
        ]
        written = np.asarray(found.rows.targets[i, at]).tolist()
        assert not texts or written in [[*text.tolist(), words.end] for text in texts]
    assert (np.asarray(found.count) > 1).any() == bool(c.input.max_regions)


def saved(folder, **changes):
    """A folder of ours with random parameters: (its model, its arrays by name)."""
    c = tiny.dictionary(**tiny.SHALLOW, model__text__vocab_size=600, **changes)
    model, rng = config_lib.from_dict(c).model, np.random.default_rng(0)
    shapes = grain.parameter_shapes(model)
    flat = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    checkpoint.save_model(folder, model, tables.nested(flat))
    return model, flat


def head(folder, **changes):
    """configs/text_decoder.py on that folder, of little size."""
    c = recipe.get_config(str(folder))
    c.update(dict(total_steps=4, total_epochs=None, batch_size=8, dtype="float32", log_every=1))
    c.optim.update(warmup_steps=2, warmup_epochs=None)
    c.update(dict(checkpoint_every=1, checkpoint_keep=4))
    c.input.update(source="synthetic", lanes=1)
    if c.text.packing:
        c.text.update(pack_group=2, pack_rows=8)
    c.loss.terms.words.update(SIZES)
    c.evals = {}
    c.update_from_flattened_dict(changes)
    return config_lib.from_dict(c)


@pytest.mark.slow
def test_a_head_on_a_run_moves_nothing_else_and_resumes_bit_for_bit(tmp_path, monkeypatch, capfd):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    _, flat = saved(tmp_path / "run")
    c = head(tmp_path / "run")
    train.train(c, tmp_path / "whole")
    assert "row_length=" in capfd.readouterr().err  # as its rows of 40 are too short
    with pytest.raises(SystemExit):
        train.train(c, tmp_path / "parts", handler=tiny.EndsAt(2))
    train.train(c, tmp_path / "parts")
    lines = runs.lines(tmp_path / "whole")
    assert runs.lines(tmp_path / "parts") == lines
    assert {x for x in lines[0] if x.startswith("loss")} == {"loss", "loss_words"}
    assert {x for x in lines[0] if x.startswith("grad_norm/")} == {"grad_norm/terms"}
    assert lines[-1]["loss"] < lines[0]["loss"]
    digests = [
        checkpoint.read_json(tmp_path / name / "checkpoints" / "4", "receipt")["state"]
        for name in ("whole", "parts")
    ]
    assert digests[0] == digests[1] and "params" in digests[0]
    _, params, _ = checkpoint.load_model(str(tmp_path / "whole"))
    for name, x in grain.flat(params).items():
        np.testing.assert_array_equal(x, flat[name], err_msg=name)
    shutil.rmtree(tmp_path / "whole")


def test_a_head_costs_no_backward_pass_of_towers_and_no_text_tower(tmp_path):
    saved(tmp_path / "run")
    c = head(tmp_path / "run")
    assert not total.reads_embeddings(c.loss) and c.optim.frozen
    of = lambda **changes: flops.per_image(head(tmp_path / "run", **changes))
    alone, trained = flops.per_image(c), of(**{"optim.frozen": (), "remat": "full"})
    assert alone.text == alone.decoder == alone.losses == 0 and alone.image > 0
    # A backward pass has two products for each of a forward pass, and the cross-entropy computes its logits again.
    of_logits = 2 * SIZES["row_length"] * SIZES["width"] * 640
    of_patches = (
        2 * 2 * 4 * 32 * SIZES["width"]
    )  # no gradient of 4 patches by their keys and values
    assert alone.train == alone.image + 3 * alone.terms + of_logits - of_patches
    assert trained.train == alone.train  # the gradient is stopped


def test_two_towers_keep_the_temperature_of_their_folder(tmp_path):
    two = dict(model__decoder=None, input__max_regions=0, text__packing=False)
    two |= dict(model__image__pool="map", model__text__pool="last", model__text__causal=False)
    two |= dict(loss__contrast="sigmoid", model__logit_bias_init=-10.0)
    del_depth = {name: x for name, x in two.items() if name != "model__decoder"}
    c = tiny.dictionary(model__text__vocab_size=600, **del_depth)
    c.model.decoder = None
    model, rng = config_lib.from_dict(c).model, np.random.default_rng(0)
    shapes = grain.parameter_shapes(model)
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    checkpoint.save_model(tmp_path / "two", model, tables.nested(flat))
    found = head(tmp_path / "two")
    assert found.model == model and found.loss.contrast == "sigmoid" and not found.text.packing
    assert found.loss.terms["words"]["leading_specials"] == 0
    loaded = initialise.load(found).params
    assert loaded.keys() == flat.keys() >= {"logit_scale", "logit_bias"}
    for name, x in loaded.items():
        np.testing.assert_array_equal(x, flat[name])
    given = dict(
        model__text__vocab_size=600, model__image__pool="map", init__decoder=str(tmp_path / "one")
    )
    saved(tmp_path / "one")
    c = tiny.dictionary(**given)
    c.model.decoder, c.input.max_regions = None, 0
    with pytest.raises(errors.UserError, match="has a region decoder, but model.decoder is None"):
        initialise.load(config_lib.from_dict(c))


def test_a_head_on_the_model_of_the_package():
    c = head("aviary-tiny")
    initialise.check(c.init)
    model, params, _ = checkpoint.load_model("aviary-tiny")
    assert c.model == model and c.init.image == "aviary-tiny"
    loaded = initialise.load(c).params
    for name, x in grain.flat(params).items():
        np.testing.assert_array_equal(loaded.pop(name), np.asarray(x, np.float32), err_msg=name)
    assert not loaded


def test_special_tokens_are_those_of_the_tokenizer():
    words = clip_tokenizer.ClipTokenizer()
    train.check_specials(config(), words)
    with pytest.raises(errors.UserError, match=r"got \(0, 1\), expected \(1, 1\), what model.text"):
        train.check_specials(config(words=WORDS | {"leading_specials": 0}), words)
