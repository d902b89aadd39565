"""One step on 8 virtual devices: the same numbers on every mesh, with micro-batches, and a clean HLO."""

import functools
import math
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import losses
from grain_jax.launch import hlo
from grain_jax.models import grain
from grain_jax.train import sharding, train_step
from tests import tiny


def _build(c):
    n = np.prod([c.mesh.data, c.mesh.fsdp, c.mesh.tensor])
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:n])
    return train_step.build(c, mesh, total_steps=c.total_steps, steps_per_epoch=1)


def _config(mesh, **overrides):
    data, fsdp, tensor = mesh
    return tiny.config(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, **overrides)


@functools.cache
def _run(mesh, **overrides):
    """(metrics of two steps of the same batch, the state after them, the gradient of the first, the compiled step)."""
    c = _config(mesh, ema_decay=0.9, optim__clip_norm=0.0, **overrides)
    program = _build(c)
    step = program.step.lower(program.state, program.batch).compile()
    state = jax.device_put(tiny.state(program), program.shardings)
    (one,), state = _steps(c, program, step, state, 1)
    # Adam's first moment after a step is a share of the gradient.
    gradient = jax.tree.map(lambda m: np.asarray(m) / (1 - c.optim.b1), state.opt_state[1].mu)
    (two,), state = _steps(c, program, step, state, 1)
    return [one, two], jax.device_get(state), gradient, step


def _steps(c, program, step, state, count):
    """(metrics of so many steps of the same batch, the state after them)."""
    batch = jax.device_put(tiny.batch(c), program.batch_sharding)
    metrics = []
    for _ in range(count):
        state, m = step(state, batch)
        metrics.append(jax.tree.map(float, m))
    return metrics, state


ONE = (1, 1, 1)
PLAIN = dict(loss__group_size=4)
EVERY = dict(
    **PLAIN,
    input__captions_per_image=3,
    input__negatives_per_region=2,
    text__pack_rows=10,
    model__boxes__kind="roi_align",
    model__image__keep=0.5,
    loss__image_description=0.5,
    loss__box_description=0.5,
    loss__hard_negative=0.5,
)


@pytest.mark.parametrize(
    "mesh,model,overrides",
    [
        ((2, 2, 2), EVERY, dict(microbatches=2, remat="qkv", loss__gather=2, loss__tile=7)),
    ],
)
def test_mesh_microbatches_and_remat_change_nothing(mesh, model, overrides):
    """Dropout is on: its mask and the kept patches belong to the example, wherever that is computed."""
    expected, state, gradient, _ = _run(ONE, **model)
    assert ("hard_negative_accuracy" in expected[0]) == (model is EVERY)
    metrics, other, other_gradient, _ = _run(mesh, **model, **overrides)
    for a, b in zip(expected, metrics):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=2e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(state.ema_params), jax.tree.leaves(other.ema_params)):
        # An Adam step moves parameters whose gradient is float noise by up to the learning rate.
        np.testing.assert_allclose(a, b, atol=3e-4)
    for (name, a), b in zip(grain.flat(gradient).items(), grain.flat(other_gradient).values()):
        # Key biases and the like have a gradient of 0 but for rounding: those are compared absolutely.
        assert np.abs(a - b).max() / max(np.abs(a).max(), 1e-2) < 2e-5, name


@pytest.fixture(scope="module")
def large():
    """(config, program, [(instruction, whether it runs in a loop) of the compiled step]), every switch on."""
    # 26 images on each part of a device, 19 values an embedding: no other product of sizes has these factors.
    c = _config(
        (2, 4, 1),
        batch_size=8 * 3 * 26,
        model__embed_dim=19,
        loss__tile=64,
        microbatches=3,
        remat="full",
        ema_decay=0.9,
    )
    program = _build(c)
    module = hlo.parse(program.step.lower(program.state, program.batch).compile().as_text())
    computations = module.computations.items()
    placed = [
        (i, name in module.in_loop) for name, x in computations for i in x.instructions.values()
    ]
    return c, program, placed


def test_no_buffer_of_the_step_grows_with_the_global_batch(large):
    """No array of the compiled step has a batch-sized dimension, nor a batch's elements spelt otherwise."""
    c, _, placed = large
    b, r = c.batch_size, c.input.max_regions
    limits = {b * b, b * r * b * r, b * c.model.embed_dim, b * r * c.model.embed_dim}
    for instruction, _ in placed:
        for shape in instruction.shapes:
            assert not {b, b * r, b * (1 + r)} & set(shape.dims), instruction
            assert math.prod(shape.dims) not in limits, instruction


def test_fsdp_gathers_a_layer_at_a_time(large):
    _, program, placed = large
    stacked = {
        leaf.shape
        for name, leaf in grain.flat(program.state.params).items()
        if "kernel" in name and "blocks" in name
    }
    layer = {shape[1:] for shape in stacked}
    gathered, in_loops = set(), 0
    for instruction, in_loop in placed:
        if instruction.opcode.startswith("all-gather"):
            for shape in instruction.shapes:
                assert shape.dims not in stacked, instruction
                dims = tuple(n for n in shape.dims if n != 1)
                if in_loop and dims in layer:
                    gathered.add(dims)
                in_loops += in_loop
    assert in_loops and gathered == layer, (gathered, layer)


def test_products_of_the_losses_are_float32_at_highest_precision():
    c = tiny.config(dtype="bfloat16", mesh__data=8)
    program = _build(c)
    jaxpr = jax.make_jaxpr(program.step)(program.state, program.batch)
    found = []

    def visit(jaxpr, inside):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if inside and name == "dot_general":
                types = {v.aval.dtype.name for v in (*equation.invars, *equation.outvars)}
                found.append((types, equation.params["precision"]))
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner, inside or name == "shard_map")

    visit(jaxpr.jaxpr, False)
    highest = (jax.lax.Precision.HIGHEST,) * 2
    # Forward and backward of two directions of captions and one of regions.
    assert len(found) >= 9
    assert all(types == {"float32"} and precision == highest for types, precision in found), found


COLLECTIVES = re.compile(r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(")


def test_matching_has_no_collective_loop_or_host_callback():
    *_, step = _run((8, 1, 1), **PLAIN)
    lines = step.as_text().splitlines()
    scoped = [line for line in lines if re.search(r'op_name="[^"]*matching', line)]
    assert len(scoped) > 20, "the scope's name is gone: this test sees nothing"
    assert not [line for line in scoped if COLLECTIVES.search(line)]
    leaves = re.compile(r"\bwhile\(|custom-call\(|infeed|outfeed")
    assert not [line for line in scoped if leaves.search(line)]
    assert any(COLLECTIVES.search(x) for x in lines), "no collective at all: is the batch sharded?"


def test_texts_dropped_are_counted_from_the_start():
    c = tiny.config()
    metrics, state, _, _ = _run((8, 1, 1), **PLAIN)
    a_step = int(tiny.batch(c).texts_dropped.sum())
    assert a_step > 0
    assert [m["texts_dropped"] for m in metrics] == [a_step, 2 * a_step]
    assert int(state.step) == 2 and int(state.texts_dropped) == 2 * a_step
    counts = tiny.batch(c).text_counts.sum(axis=0)
    assert state.text_counts.tolist() == (2 * counts).tolist()
    assert [(m["texts"], m["texts_too_long"]) for m in metrics] == [(*counts,), (*(2 * counts),)]


def test_metrics_of_modules_and_queries():
    c = tiny.config()
    metrics, *_ = _run((8, 1, 1), **PLAIN)
    for m in metrics:
        modules = [m[f"grad_norm/{name}"] for name in ("image", "text", "decoder", "heads")]
        assert min(modules) > 1e-3
        np.testing.assert_allclose(np.linalg.norm(modules), m["grad_norm"], rtol=1e-5)
        share = np.array([m[f"query_share/{i}"] for i in range(c.model.decoder.queries)])
        np.testing.assert_allclose(share.sum(), 1, rtol=1e-6)
        share = share[share > 0]
        entropy = -(share * np.log(share)).sum() / np.log(c.model.decoder.queries)
        np.testing.assert_allclose(m["query_usage_entropy"], entropy, rtol=1e-5)


def test_a_frozen_module_has_no_gradient_norm():
    grads = {
        "image": {"a": jnp.array([3.0]), "b": jnp.array([4.0])},
        "text": {"a": jnp.array([5.0])},
        "box_mlp": jnp.array([6.0]),
        "logit_scale": jnp.array(8.0),
    }
    norms = jax.tree.map(float, train_step.grad_norms(grads, ("text/.*", "image/b")))
    assert norms.pop("grad_norm") == pytest.approx(109**0.5)
    assert norms == {"grad_norm/image": 3.0, "grad_norm/heads": 10.0}


@pytest.mark.parametrize("queries,entropy", [(1, False), (17, True)])
def test_queries_have_metrics_only_where_they_tell_something(queries, entropy):
    share = jnp.full(queries, 1 / queries)
    values = losses.Losses(jnp.float32(0), {}, {"query_share": share})
    metrics = train_step.loss_metrics(values)
    assert ("query_usage_entropy" in metrics) == entropy
    assert sum(name.startswith("query_share/") for name in metrics) == (0 if entropy else 1)
    assert not entropy or abs(metrics["query_usage_entropy"] - 1) < 1e-6


@pytest.mark.slow
def test_a_run_without_regions_trains_on_captions_alone():
    """The CLIP baseline: no region is read."""
    captions = dict(input__max_regions=0, loss__box=0.0, loss__region_description=0.0)
    metrics, *_ = _run(ONE, **captions, microbatches=2)
    assert metrics[0]["loss"] == metrics[0]["loss_image_caption"] > 1
    assert metrics[1]["loss"] != metrics[0]["loss"]
    assert metrics[0]["loss_box"] == metrics[0]["loss_region_description"] == 0
    assert 0 <= metrics[0]["image_caption_accuracy"] <= 1
    of_regions = ("query", "region", "matched_iou50")
    assert not [name for name in metrics[0] if name.startswith(of_regions)]
