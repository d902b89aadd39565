"""A step is the same on every mesh, in micro-batches, with remat and after a resume; and what it costs.

One table for all that a step may hold. Each row compiles two programs, which the further tests read.
"""

import functools
import json
import os
import re
import zlib
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.launch import hlo, hlo_collectives, hlo_work
from grain_jax.models import grain
from grain_jax.train import flops, forward, sharding, train_step
from tests import paths, tiny
from tests.train import terms

pytestmark = pytest.mark.long

DECODER = dict(
    loss__group_size=4,
    input__captions_per_image=3,
    input__negatives_per_region=2,
    text__pack_rows=10,
    model__boxes__kind="roi_align",
    model__image__keep=0.5,
    model__decoder__boxes="pointer",
    model__decoder__reads_box=True,
    loss__image_description=0.5,
    loss__box_description=0.5,
    loss__hard_negative=0.5,
)
CONFIGS = {
    "decoder": DECODER,
    "terms": tiny.TWO_SHALLOW | dict(loss__terms=terms.ENTRIES, optim__name="muon"),
    "lora": tiny.TWO_SHALLOW | dict(optim__lora__rank=4, optim__lora__alpha=6.0, optim__learning_rate=0.02),
}
ONE = dict(mesh__data=1)
EIGHT = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, microbatches=2, loss__tile=7)


@functools.cache
def program_of(name, on_eight):
    """(config, program, its compiled step) of a row on one device, or on eight in micro-batches."""
    mesh = EIGHT | dict(remat="qkv" if name != "terms" else "full") if on_eight else ONE
    c = tiny.config(**CONFIGS[name] | mesh, ema_decay=0.9, optim__clip_norm=0.0)
    program = tiny.program(c, 8 if on_eight else 1)
    return c, program, program.step.lower(program.state, program.batch).compile()


def step_from(name, on_eight, state):
    """(metrics, the state after a step from a state of NumPy arrays)."""
    c, program, step = program_of(name, on_eight)
    batch = jax.device_put(tiny.batch(c), program.batch_sharding)
    state, metrics = step(jax.device_put(state, program.shardings), batch)
    return jax.tree.map(float, metrics), jax.device_get(state)


def first_state(name):
    _, program, _ = program_of(name, False)
    state = tiny.state(program)
    return state._replace(term_state=jax.device_get(program.term_state(state.params)))


@functools.cache
def two_steps(name, on_eight=False):
    """[(metrics, state after)] of two steps; on eight devices the second is a resume of the run on one."""
    first = step_from(name, on_eight, first_state(name))
    before = two_steps(name)[0][1] if on_eight else first[1]
    return [first, step_from(name, on_eight, before)]


def gradients(c, state):
    """Adam's first moment after the first step is a share of the gradient."""
    flat = grain.flat(state.opt_state)
    return {name: np.asarray(x) / (1 - c.optim.b1) for name, x in flat.items() if "/mu/" in name}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_the_same_on_eight_devices_and_after_a_resume(name):
    """With dropout: its masks, the kept patches and draws of terms belong to the image, wherever it is."""
    c, expected, got = program_of(name, False)[0], two_steps(name), two_steps(name, True)
    for (metrics, state), (others, other) in zip(expected, got, strict=True):
        for key in metrics:
            np.testing.assert_allclose(others[key], metrics[key], rtol=2e-5, err_msg=key)
        for a, b in zip(jax.tree.leaves(state.ema_params), jax.tree.leaves(other.ema_params)):
            # An Adam step moves parameters whose gradient is float noise by up to the learning rate.
            np.testing.assert_allclose(a, b, atol=3e-4)
        for a, b in zip(jax.tree.leaves(state.term_state), jax.tree.leaves(other.term_state)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-4)
    ours, theirs = (gradients(c, steps[0][1]) for steps in (expected, got))
    for key, a in ours.items():
        # Key biases and the like have a gradient of 0 but for rounding: those are compared absolutely.
        assert np.abs(a - theirs[key]).max() / max(np.abs(a).max(), 1e-2) < 2e-5, key


def test_counts_and_metrics_of_two_steps():
    c, steps = program_of("decoder", False)[0], two_steps("decoder")
    per_step = int(tiny.batch(c).texts_dropped.sum())
    assert per_step > 0 and int(steps[1][1].step) == 2
    assert [m["texts_dropped"] for m, _ in steps] == [per_step, 2 * per_step]
    counts = tiny.batch(c).text_counts.sum(axis=0)
    assert steps[1][1].text_counts.tolist() == (2 * counts).tolist()
    assert [(m["texts"], m["texts_too_long"]) for m, _ in steps] == [(*counts,), (*(2 * counts),)]
    for m, _ in steps:
        modules = [m[f"grad_norm/{name}"] for name in ("image", "text", "decoder", "heads")]
        assert min(modules) > 1e-3 and "hard_negative_accuracy" in m
        np.testing.assert_allclose(np.linalg.norm(modules), m["grad_norm"], rtol=1e-5)
        share = np.array([m[f"query_share/{i}"] for i in range(c.model.decoder.queries)])
        np.testing.assert_allclose(share.sum(), 1, rtol=1e-6)
        share = share[share > 0]
        entropy = -(share * np.log(share)).sum() / np.log(c.model.decoder.queries)
        np.testing.assert_allclose(m["query_usage_entropy"], entropy, rtol=1e-5)


def test_another_step_has_other_draws():
    """The same state but for the number of its step: dropout and the kept patches are drawn anew."""
    first = first_state("decoder")
    other, _ = step_from("decoder", False, first._replace(step=np.int32(1)))
    expected = two_steps("decoder")[0][0]
    for name in ("loss_image_caption", "loss_box"):
        assert abs(other[name] - expected[name]) > 1e-3, name


def test_matching_has_no_collective_loop_or_host_callback():
    collectives = re.compile(r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(")
    lines = program_of("decoder", True)[2].as_text().splitlines()
    scoped = [line for line in lines if re.search(r'op_name="[^"]*matching', line)]
    assert len(scoped) > 20, "the scope's name is gone: this test sees nothing"
    assert not [line for line in scoped if collectives.search(line)]
    leaves = re.compile(r"\bwhile\(|custom-call\(|infeed|outfeed")
    assert not [line for line in scoped if leaves.search(line)]
    assert any(collectives.search(x) for x in lines), "no collective at all: is the batch sharded?"


def test_lora_moves_the_factors_alone():
    before, (_, after) = first_state("lora"), two_steps("lora")[0]
    moved = 0
    for tree in ("params", "ema_params"):
        start, end = (grain.flat(getattr(state, tree)) for state in (before, after))
        for name, x in end.items():
            if name.startswith(("image", "text")) and "lora_" not in name:
                np.testing.assert_array_equal(x, start[name], err_msg=name)
            moved += "lora_" in name and not np.array_equal(x, start[name])
    moments = {name for name in grain.flat(after.opt_state) if "/image" in name or "/text" in name}
    assert moved == len(moments) == 2 * 24 and all("lora_" in name for name in moments)


def test_a_run_without_regions_trains_on_captions_alone():
    """The CLIP baseline: no region is read."""
    c = tiny.small(input__max_regions=0, loss__box=0.0, loss__region_description=0.0)
    shapes = tiny.program(c, 1)
    _, metrics = jax.eval_shape(shapes.step, shapes.state, shapes.batch)
    of_regions = ("query", "region", "matched_iou50")
    assert not [name for name in metrics if name.startswith(of_regions)]
    assert {"loss_box", "image_caption_accuracy"} <= metrics.keys()


def test_the_loss_is_the_mean_over_the_global_batch():
    """The sums and the loss by hand, from one call of the model on the whole batch."""
    c, state = program_of("terms", False)[0], first_state("terms")
    batch = tiny.batch(c)
    (metrics, _), (_, after) = two_steps("terms")
    model = grain.GRAIN(c.model)
    of_model = jax.device_put({"params": forward.without_terms(state.params)})

    @functools.partial(jax.jit, static_argnames="method")
    def apply(*given, method=None):
        return model.apply(of_model, *given, method=method)

    _, features = apply(batch, None, method="outputs_and_features")
    linear = state.params["terms"]["smooth"]["map"]
    patches = features.tokens[:, 1:] @ linear["kernel"] + linear["bias"]
    keys = train_step.dropout_keys(c.seed, 0, jnp.arange(c.batch_size))
    keys = jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(b"smooth")))(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
    other = apply(batch.image[:, ::-1], method="image_tokens").mean((1, 2))
    texts = jnp.repeat(features.text.mean((1, 2, 3)), 2)
    loss = 1.5 * jnp.square(patches + 0.1 * noise[:, None]).sum((1, 2)) + other + texts
    count = 1 + batch.caption_id[:, 0] % 3
    np.testing.assert_allclose(metrics["loss_smooth"], np.average(loss, weights=count), rtol=1e-5)
    np.testing.assert_allclose(metrics["smooth/norm"], jnp.abs(patches).mean((1, 2)).mean(), rtol=1e-5)
    weights = {"image_caption": 1, "smooth": 0.3, "average": 0.7}
    total = sum(weight * metrics[f"loss_{name}"] for name, weight in weights.items())
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    linear = state.params["terms"]["average"]["map"]
    mirrored = apply(batch.image[:, :, ::-1], method="image_tokens")[:, 0]
    average = jnp.square((features.tokens[:, 0] - mirrored) @ linear["kernel"]).sum(-1).mean()
    np.testing.assert_allclose(metrics["loss_average"], average, rtol=1e-5)
    # Each of two steps of the same batch moves the centre half of the way to the mean of that step.
    assert set(after.term_state) == {"smooth", "average"}
    assert np.abs(after.term_state["smooth"]["centre"]).max() > 1e-3


def test_parameters_of_terms_are_sharded_averaged_and_counted():
    c, (_, state) = program_of("terms", False)[0], two_steps("terms")[0]
    for tree in (state.params, state.ema_params):
        assert set(tree["terms"]) == {"smooth", "average"}
        assert set(tree["terms"]["smooth"]["map"]) == {"kernel", "bias"}
    of_bias = "terms/average/map/bias"
    assert [np.abs(x).max() > 0 for k, x in gradients(c, state).items() if of_bias in k] == [True]
    boxed = jax.eval_shape(forward.Forward(c).init)["terms"]["smooth"]["map"]["kernel"]
    assert boxed.names == ("width", "vector")
    with_terms, without = (flops.per_image(x) for x in (c, tiny.config(**tiny.TWO_SHALLOW)))
    assert with_terms.image == without.image and with_terms.terms > without.image  # a second view
    assert with_terms.train > without.train + with_terms.terms


def test_a_fresh_state_does_not_depend_on_the_terms():
    """The model has the parameters of a run without terms; a term's depend on its name alone."""
    c, plain = program_of("terms", False)[0], tiny.config(**tiny.TWO_SHALLOW)
    with_terms, without = (jax.jit(forward.Forward(x).init)() for x in (c, plain))
    jax.tree.map(np.testing.assert_array_equal, forward.without_terms(with_terms), dict(without))
    kernel = sharding.unbox(with_terms)["terms"]["smooth"]["map"]["kernel"]
    assert 0.1 < np.std(kernel) < 0.3


def test_a_term_without_parameters_leaves_the_tree_as_it_is():
    """So that a run may resume with it, or without."""
    plain, c = tiny.config(), tiny.dictionary()
    c.loss.terms.bare = {"term": f"{terms.__name__}:Bare", "weight": 1.0}
    c = config_lib.from_dict(c)
    trees = [jax.eval_shape(forward.Forward(x).init) for x in (plain, c)]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])


def test_an_average_in_the_state_follows_the_parameters_and_is_sharded_as_they_are():
    (_, state), first = two_steps("terms")[1], first_state("terms")
    term_state = state.term_state["average"]
    assert term_state["steps"] == 2
    assert set(term_state["average"].term) == {"map"} and "terms" not in term_state["average"].model
    # After two steps: 9/16 of the first, 3/16 of those after one step, 1/4 of the last; frozen parts stay.
    last, before = grain.flat(state.params), grain.flat(first.params)
    for name, x in grain.flat(term_state["average"].model).items():
        low, high = np.minimum(last[name], before[name]), np.maximum(last[name], before[name])
        assert (x >= low - 3e-3).all() and (x <= high + 3e-3).all(), name
    program = program_of("terms", True)[1]
    of_params, copied = program.shardings.params, program.shardings.term_state["average"]["average"]
    assert grain.flat(copied.model).items() <= grain.flat(of_params).items()
    assert copied.term == of_params["terms"]["average"]
    again = jax.device_get(jax.eval_shape(program.term_state, program.state.params))
    jax.tree.map(lambda a, b: a.shape == b.shape or 1 / 0, again, program.state.term_state)


COSTS = paths.GOLDENS / "step_cost.json"
PLAIN = dict(batch_size=32, text__pack_group=4, text__pack_rows=8, mesh__data=8)
# A little more than what rounding to tiles and choices of fusions change.
SLACK = {"flops": 1.001, "bytes_accessed": 1.05, "temporary_bytes": 1.05, "collective_bytes": 1.01}


@pytest.mark.parametrize("name", [pytest.param("data", marks=pytest.mark.slow), "all_axes"])
def test_the_step_costs_no_more_than_recorded(name):
    """FLOPs, bytes, temporaries and collectives in the compiler's output with the flags of `tests.compiling`.

    goldens/step_cost.json has them for one version of JAX. After a change that is meant to cost,
    UPDATE_GOLDENS=1 rewrites them, and the commit says why.
    """
    if name == "all_axes":
        step = program_of("decoder", True)[2]
    else:  # a plain model whose batch is cut in eight
        program = tiny.program(tiny.config(**PLAIN))
        step = program.step.lower(program.state, program.batch).compile()
    version = metadata.version("jaxlib")
    module = hlo.parse(step.as_text())
    costs = {
        "flops": hlo_work.dot_flops(module),
        "bytes_accessed": hlo_work.bytes_accessed(module),
        "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
    }
    kinds: dict = {}
    for x in hlo_collectives.collectives(module):
        kind = kinds.setdefault(x.kind, {"count": 0, "bytes": 0})
        kind["count"], kind["bytes"] = kind["count"] + x.count, kind["bytes"] + x.bytes
    golden = json.loads(COSTS.read_text())
    if os.environ.get("UPDATE_GOLDENS"):
        golden |= {name: costs | {"collectives": kinds}, "jaxlib": version}
        COSTS.write_text(json.dumps(golden, indent=2, sort_keys=True) + "\n")
    recorded = golden[name]
    assert set(kinds) <= set(recorded["collectives"])
    if golden["jaxlib"] != version:  # another compiler fuses otherwise
        assert costs["flops"] <= 1.05 * recorded["flops"]
        return
    for cost, value in costs.items():
        assert value <= SLACK[cost] * recorded[cost], cost
    for kind, collective in kinds.items():
        assert collective["count"] <= recorded["collectives"][kind]["count"], kind
        most = SLACK["collective_bytes"] * recorded["collectives"][kind]["bytes"]
        assert collective["bytes"] <= most, kind


def test_eight_devices_share_the_work_and_repeat_none():
    """The recorded FLOPs of a device, times 8, are the model's own count for the batch (`flops.py`)."""
    recorded, c = json.loads(COSTS.read_text()), tiny.config(**PLAIN)
    per_batch = flops.per_image(c).train * c.batch_size
    assert 8 * recorded["data"]["flops"] / per_batch == pytest.approx(1, abs=0.01)
