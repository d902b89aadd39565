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
from grain_jax.losses.layout import AXES
from grain_jax.train import sharding
from tests import tiny
from tests.losses.test_losses import random_outputs

pytestmark = pytest.mark.long

M, K, D = 24, 13, 16  # rows and columns per device, size of the vectors
SCALE, BIAS = 20.0, -1.5


def _problem(devices):
    """Rows with two ids each, columns with one, some shared; some of both are padding; cotangents of both."""
    rng = np.random.default_rng(1)

    def vectors(n, ids):
        x = rng.normal(size=(n, D))
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        ids = rng.integers(0, devices * K // 2, (n, ids)).astype(np.int32)
        ids = np.where(rng.random(ids.shape) < 0.8, ids, streaming.NO_ID)
        return x, ids, rng.random(n) < 0.8, rng.normal(size=n).astype(np.float32)

    *rows, of_rows = vectors(devices * M, 2)
    embed, ids, real, of_columns = vectors(devices * K, 1)
    masks = np.stack([np.zeros_like(real), real], axis=1)
    return tuple(rows), streaming.Columns(embed, ids[:, 0], masks), of_rows, of_columns


def _exact(contrast, both, rows, columns, of_rows, of_columns):
    """In float64: costs and highest logits of both sides, gradients of rows, columns, scale and bias."""
    x, y = rows[0].astype(np.float64), columns.embed.astype(np.float64)
    allowed = rows[2][:, None] & columns.real[:, 1]
    same = (rows[1][:, :, None] == columns.ids) & (columns.ids != streaming.NO_ID)
    allowed &= ~same.any(1)
    z = SCALE * x @ y.T + BIAS
    highest = [np.where(allowed, z, streaming.MASKED).max(axis) for axis in (1, 0)]
    if contrast == "softmax":
        with np.errstate(divide="ignore"):
            costs = [np.log(np.where(allowed, np.exp(z), 0).sum(axis)) for axis in (1, 0)]
        shares = [np.where(allowed, np.exp(z - cost), 0) for cost in (costs[0][:, None], costs[1])]
        costs = [np.maximum(x, streaming.MASKED) for x in costs]
    else:
        costs = [np.where(allowed, np.log1p(np.exp(z)), 0).sum(axis) for axis in (1, 0)]
        shares = [np.where(allowed, 1 / (1 + np.exp(-z)), 0)] * 2
    share = of_rows[:, None] * shares[0] + (of_columns * shares[1] if both else 0)
    gradients = SCALE * share @ y, SCALE * share.T @ x, (share * (x @ y.T)).sum(), share.sum()
    return costs, highest, gradients


@pytest.mark.parametrize(
    "contrast,both,devices,tile,precision",
    [
        ("softmax", False, 8, 10, "high"),
        ("softmax", True, 1, 7, "highest"),
        ("softmax", True, 1, 50, "highest"),  # the plain form
        ("softmax", True, 8, 10, "high"),
        ("softmax", True, 8, 50, "highest"),
        ("sigmoid", False, 1, 10, "highest"),
        ("sigmoid", True, 8, 10, "highest"),
    ],
)
def test_values_and_gradients_equal_the_whole_matrix(contrast, both, devices, tile, precision):
    problem = _problem(devices)
    axes = AXES if devices > 1 else ()
    grid = np.array(jax.devices()[:devices]).reshape(-1, max(1, devices // 2))
    mesh, spec = jax.sharding.Mesh(grid, AXES), PartitionSpec(AXES)
    options = dict(tile=tile, axes=axes, precision=jax.lax.Precision(precision))

    def value_and_pull(rows, columns, *cotangents):
        def run(x, y, scale, bias):
            few = streaming.Rows(x[:1], rows[1][:1], rows[2][:1], scale, bias, mask=0)  # without negatives
            ours = streaming.Rows(x, *rows[1:], scale, bias, mask=1, both=both)
            every = streaming.gathered(columns._replace(embed=y), axes)
            return streaming.negatives(contrast, [few, ours], every, **options)[1]

        scalars = jnp.float32(SCALE), jnp.float32(BIAS)
        result, pull = jax.vjp(run, rows[0], columns.embed, *scalars)
        # What comes back to the highest logit has no effect.
        back = [streaming.Negatives(c, jnp.ones_like(c)) for c in cotangents]
        x_bar, y_bar, *scalars = pull((back[0], back[1] if both else None))
        return result, (x_bar, y_bar, *(x[None] for x in scalars))

    run = jax.shard_map(value_and_pull, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    result, (x_bar, y_bar, *scalars) = jax.jit(run)(*problem)
    costs, highest, gradients = _exact(contrast, both, *problem)
    rtol = 2e-5
    for side in range(1 + both):
        np.testing.assert_allclose(result[side].cost, costs[side], rtol=rtol)
        np.testing.assert_allclose(result[side].highest, highest[side], rtol=rtol)
    results = x_bar, y_bar, *(x.sum() for x in scalars)
    for name, a, b in zip(("rows", "columns", "scale", "bias"), gradients, results, strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol * np.abs(a).max(), err_msg=name)


@pytest.mark.parametrize("tile", [5, 50])
def test_a_row_without_negatives_costs_nothing(tile):
    (embed, *_), columns, *_ = _problem(1)
    columns = columns._replace(ids=np.zeros_like(columns.ids))

    def negatives_of(embed):
        rows = streaming.Rows(embed, np.zeros((M, 1), np.int32), np.ones(M, bool), 20.0, 0.0, mask=1)
        return streaming.negatives("softmax", [rows], columns, tile=tile)[0][0]

    (value, highest), pull = jax.vjp(negatives_of, embed)
    assert np.all(value == np.float32(streaming.MASKED)) and np.all(highest == value)
    assert not np.any(pull(streaming.Negatives(jnp.ones(M), jnp.ones(M)))[0])
    assert not np.any(streaming.loss_of_rows("softmax", np.ones(M, np.float32), value))


@pytest.mark.parametrize("tile", [2, 50])
def test_no_id_is_equal_to_no_other(tile):
    """Rows and columns without an id are negatives of each other; padding is a negative of none."""
    embed = np.eye(3, dtype=np.float32)
    no_ids = np.full((3, 1), streaming.NO_ID)
    real = np.array([True, True, False])
    columns = streaming.Columns(embed, no_ids[:, 0], real[:, None])
    rows = streaming.Rows(embed, no_ids, np.ones(3, bool), 2.0, 0.0, both=True)
    of_rows, of_columns = streaming.negatives("softmax", [rows], columns, tile=tile)[0]
    hit, miss = np.log(np.exp(2) + 1), np.log(2)  # a row with its own column among two, and without
    np.testing.assert_allclose(of_rows.cost, [hit, hit, miss], rtol=1e-6)
    hit = np.log(np.exp(2) + 2)  # a column with three rows
    np.testing.assert_allclose(of_columns.cost, [hit, hit, streaming.MASKED], rtol=1e-6)


def test_groups_that_cross_devices_are_refused():
    c = tiny.config(batch_size=48)
    with pytest.raises(errors.UserError, match=r"loss.group_size: got 4, expected a divisor or a"):
        losses.make_layout(48, dataclasses.replace(c.loss, group_size=4), 8)


PER_DEVICE, WIDTH = 2 * 13, 19  # no other product of sizes of the losses has these primes


def test_memory_holds_the_texts_of_the_batch_and_no_product_of_them():
    """Texts of all devices are gathered once; images, boxes and logits stay on one device."""
    captions = 3
    c = tiny.config(
        batch_size=8 * PER_DEVICE,
        loss__tile=64,
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
    forbidden = {images * WIDTH, images**2, 2 * images**2, images * regions, regions**2}
    forbidden |= {captions * images**2, (captions * images) ** 2}
    assert not forbidden & set(sizes), forbidden & set(sizes)
    assert max(sizes) <= 1.1 * regions * WIDTH
    gathers = re.findall(r"= f32\[(\d+,\d+)\]\S* all-gather\(", text)
    assert sorted(gathers) == sorted(f"{n},{WIDTH}" for n in (captions * images, regions))
