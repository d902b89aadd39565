"""Streamed contrast against a float64 replica of the whole matrix, and what its compiled form holds."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grain_jax import losses
from grain_jax.core import errors
from grain_jax.losses import streaming
from grain_jax.losses.ring import Ring
from grain_jax.train import sharding
from tests import tiny
from tests.losses.test_losses import random_outputs

pytestmark = pytest.mark.long

M, K, D = 24, 13, 16  # rows and columns per device, size of the vectors
SCALE, BIAS = 20.0, -1.5


def _problem(devices):
    """Rows with one id each, columns with two, some shared; some of both are padding; cotangents of both."""
    rng = np.random.default_rng(1)

    def vectors(n, ids):
        x = rng.normal(size=(n, D))
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        ids = rng.integers(0, devices * K // 2, (n, ids)).astype(np.int32)
        cotangent = rng.normal(size=n).astype(np.float32)
        return streaming.Vectors(
            x, np.where(rng.random(ids.shape) < 0.8, ids, -1), rng.random(n) < 0.8
        ), cotangent

    (rows, of_rows), (columns, of_columns) = vectors(devices * M, 1), vectors(devices * K, 2)
    return rows._replace(ids=np.abs(rows.ids)), columns, of_rows, of_columns


def _exact(contrast, both, rows, columns, of_rows, of_columns):
    """In float64: costs and highest logits of both sides, gradients of rows, columns, scale and bias."""
    x, y = rows.embed.astype(np.float64), columns.embed.astype(np.float64)
    allowed = rows.real[:, None] & columns.real
    allowed &= (rows.ids[:, None] != columns.ids).all(-1)
    z = SCALE * x @ y.T + BIAS
    highest = [np.where(allowed, z, streaming.MASKED).max(axis) for axis in (1, 0)]
    if contrast == "softmax":
        with np.errstate(divide="ignore"):
            costs = [np.log(np.where(allowed, np.exp(z), 0).sum(axis)) for axis in (1, 0)]
        shares = [np.where(allowed, np.exp(z - cost), 0) for cost in (costs[0][:, None], costs[1])]
    else:
        costs = [np.where(allowed, np.log1p(np.exp(z)), 0).sum(axis) for axis in (1, 0)]
        shares = [np.where(allowed, 1 / (1 + np.exp(-z)), 0)] * 2
    share = of_rows[:, None] * shares[0] + (of_columns * shares[1] if both else 0)
    gradients = SCALE * share @ y, SCALE * share.T @ x, (share * (x @ y.T)).sum(), share.sum()
    return costs, highest, gradients


@pytest.mark.parametrize(
    "contrast,both,devices,gather,tile,has_path,precision",
    [
        ("softmax", False, 8, 1, 10, True, "high"),
        ("softmax", True, 1, 1, 7, False, "highest"),
        ("softmax", True, 8, 1, 10, True, "high"),
        ("softmax", True, 8, 2, 24, True, "highest"),
        ("softmax", True, 8, 8, 50, False, "highest"),
        ("sigmoid", False, 8, 2, 10, False, "highest"),
    ],
)
def test_values_and_gradients_equal_the_whole_matrix(
    contrast, both, devices, gather, tile, has_path, precision
):
    problem = _problem(devices)
    length = devices // gather
    path = tuple(np.random.default_rng(0).permutation(length).tolist()) if has_path else ()
    ring = Ring(
        ("ring",), length, "gather" if gather > 1 else None, path=path, precision=jax.lax.Precision(precision)
    )
    grid = np.array(jax.devices()[:devices]).reshape(-1, gather)
    mesh, spec = jax.sharding.Mesh(grid, ("ring", "gather")), PartitionSpec(("ring", "gather"))

    def value_and_pull(rows, columns, *cotangents):
        run = lambda x, y, scale, bias: streaming.negatives(
            contrast, both, tile, ring, rows._replace(embed=x), columns._replace(embed=y), scale, bias
        )
        scalars = jnp.float32(SCALE), jnp.float32(BIAS)
        result, pull = jax.vjp(run, rows.embed, columns.embed, *scalars)
        # What comes back to the highest logit has no effect.
        back = [streaming.Negatives(c, jnp.ones_like(c)) for c in cotangents]
        x_bar, y_bar, *scalars = pull((back[0], back[1] if both else None))
        return result, (x_bar, y_bar, *(x[None] for x in scalars))

    run = jax.shard_map(value_and_pull, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    lowered = jax.jit(run).lower(*problem)
    result, (x_bar, y_bar, *scalars) = lowered.compile()(*problem)
    costs, highest, gradients = _exact(contrast, both, *problem)
    rtol = 2e-5
    for side in range(1 + both):
        np.testing.assert_allclose(result[side].cost, costs[side], rtol=rtol)
        np.testing.assert_allclose(result[side].highest, highest[side], rtol=rtol)
    results = x_bar, y_bar, *(x.sum() for x in scalars)
    for name, a, b in zip(("rows", "columns", "scale", "bias"), gradients, results, strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol * np.abs(a).max(), err_msg=name)
    if length > 1:
        sent = set(re.findall(r"collective_permute.*?-> tensor<\S+x(\w+)>", lowered.as_text()))
        assert sent == {"f32", "i32"}
        ways = set(re.findall(r"source_target_pairs = dense<(.*?)>", lowered.as_text()))
        assert len(ways) == 1 + has_path  # half of each block goes back along the path


def test_a_row_without_negatives_costs_nothing():
    rows, columns, *_ = _problem(1)
    columns = columns._replace(ids=columns.ids * 0)
    negatives_of = lambda embed: streaming.negatives(
        "softmax", False, 9, Ring(), rows._replace(embed=embed, ids=rows.ids * 0), columns, 20.0, 0.0
    )[0]
    (value, highest), pull = jax.vjp(negatives_of, rows.embed)
    assert np.all(value == -np.inf) and np.all(highest == np.float32(streaming.MASKED))
    assert not np.any(pull(streaming.Negatives(jnp.ones(M), jnp.ones(M)))[0])
    assert not np.any(streaming.loss_of_rows("softmax", np.ones(M, np.float32), value))


def test_groups_that_cross_devices_are_refused():
    c = tiny.config(batch_size=48)
    with pytest.raises(errors.UserError, match=r"loss.group_size: got 4, expected a divisor or a"):
        losses.make_layout(48, dataclasses.replace(c.loss, group_size=4), 8)
    with pytest.raises(errors.UserError, match=r"loss.gather: got 3, expected a divisor of the 8"):
        losses.make_layout(48, dataclasses.replace(c.loss, gather=3), 8)


PER_DEVICE, WIDTH = 2 * 13, 19  # no other product of sizes of the losses has these primes


@pytest.mark.parametrize("gather,captions", [pytest.param(2, 1, marks=pytest.mark.slow), (2, 3)])
def test_memory_of_the_losses_does_not_hold_the_global_batch(gather, captions):
    """No buffer of the gradient is as large as the batch (one ring: tests/train/test_train_step.py)."""
    c = tiny.config(
        batch_size=8 * PER_DEVICE,
        loss__gather=gather,
        loss__tile=32,
        loss__image_description=1.0,
        loss__box_description=1.0,
        input__captions_per_image=captions,
        model__embed_dim=WIDTH,
        model__boxes__kind="roi_align",
    )
    mesh, slots = sharding.make_mesh(c.mesh), c.input.max_regions
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    outputs, batch = jax.tree.map(shape, (random_outputs(c, width=WIDTH), tiny.batch(c)))
    by_batch = sharding.batch_sharding(mesh)
    cut = jax.tree.map(lambda x: by_batch if x.ndim else None, outputs)
    of_loss = lambda *x: losses.total_loss(*x, c.loss, mesh=mesh, batch_axes=sharding.BATCH_AXES).total
    step = jax.jit(jax.grad(of_loss), in_shardings=(cut, by_batch), out_shardings=cut)
    text = step.lower(outputs, batch).compile().as_text()
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n)
        for shape in re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]*)\]", text)
    ]
    images, regions = 8 * PER_DEVICE, 8 * PER_DEVICE * slots
    forbidden = {n * k * WIDTH for n in (images, captions * images, regions) for k in (1, 2)}
    forbidden |= {images**2, 2 * images**2, images * regions, regions**2}
    forbidden |= {captions * images**2, (captions * images) ** 2}
    assert not forbidden & set(sizes), forbidden & set(sizes)
    assert max(sizes) < regions * WIDTH
    permutes = re.findall(r"= \S+ collective-permute\(|collective-permute-start\(", text)
    assert permutes and "all-gather" in text
