"""Streamed contrast against a float64 replica of the whole matrix, and what its compiled form holds in memory."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grain_jax import losses
from grain_jax.core import errors
from grain_jax.losses import matching, streaming
from grain_jax.losses.ring import Ring, packed, unpacked
from grain_jax.train import sharding
from tests import tiny
from tests.losses.test_losses import (
    _outputs,
    assert_measures,
    box_description_replica,
    hard_negative_replica,
    image_description_replica,
    learnt,
    positives_replica,
    replica_and_measures,
)

M, K, D = 24, 13, 16  # rows and columns per device, size of the vectors
SCALE, BIAS = 20.0, -1.5


def _problem(devices):
    """Rows with one id each, columns with two, some of them shared; some of both are padding; cotangents of both."""
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
    "contrast,both,devices,gather,tile,slices,precision",
    [
        ("softmax", False, 1, 1, 7, 0, "highest"),
        ("softmax", False, 8, 1, 10, 2, "high"),
        ("softmax", False, 8, 4, 24, 0, "highest"),
        ("softmax", True, 1, 1, 7, 0, "highest"),
        ("softmax", True, 8, 1, 1024, 0, "highest"),
        ("softmax", True, 8, 1, 10, 1, "high"),
        ("softmax", True, 8, 2, 24, 2, "highest"),
        ("softmax", True, 8, 8, 50, 0, "highest"),
        ("sigmoid", False, 8, 2, 10, 1, "highest"),
    ],
)
def test_values_and_gradients_equal_the_whole_matrix(
    contrast, both, devices, gather, tile, slices, precision
):
    problem = _problem(devices)
    length = devices // gather
    loops = np.random.default_rng(0).permutation(length).reshape(slices, -1) if slices else []
    ring = Ring(
        ("ring",),
        length,
        "gather" if gather > 1 else None,
        loops=tuple(tuple(loop.tolist()) for loop in loops),
        precision=jax.lax.Precision(precision),
    )
    grid = np.array(jax.devices()[:devices]).reshape(-1, gather)
    mesh, spec = jax.sharding.Mesh(grid, ("ring", "gather")), PartitionSpec(("ring", "gather"))

    def value_and_pull(rows, columns, *cotangents):
        run = lambda x, y, scale, bias: streaming.negatives(
            contrast,
            both,
            tile,
            ring,
            rows._replace(embed=x),
            columns._replace(embed=y),
            scale,
            bias,
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
    rtol = 3e-4 if precision == "high" else 2e-5  # vectors travel as three bytes per number
    for side in range(1 + both):
        np.testing.assert_allclose(result[side].cost, costs[side], rtol=rtol)
        np.testing.assert_allclose(result[side].highest, highest[side], rtol=rtol)
    results = x_bar, y_bar, *(x.sum() for x in scalars)
    for name, a, b in zip(("rows", "columns", "scale", "bias"), gradients, results, strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol * np.abs(a).max(), err_msg=name)
    if length > 1:
        sent = set(re.findall(r"collective_permute.*?-> tensor<\S+x(\w+)>", lowered.as_text()))
        vectors = {"ui8"} if precision == "high" else {"f32"}
        assert sent == vectors | {"i32"} | ({"f32"} if both else set())


def test_vectors_of_three_bytes_are_the_nearest_ones():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(50, 7)) * 10.0 ** rng.integers(-30, 30, (50, 7))).astype(np.float32)
    sent = packed(jnp.asarray(x))
    found = np.asarray(unpacked(sent))
    assert sent.shape == (3, 50, 7) and sent.dtype == jnp.uint8
    # numpy's own rounding to 16 bits of a mantissa, ties aside, which no draw has.
    mantissa, exponent = np.frexp(x.astype(np.float64))
    np.testing.assert_array_equal(found, np.ldexp(np.round(mantissa * 2**16) / 2**16, exponent))
    assert 2**-18 < np.abs(found / x.astype(np.float64) - 1).max() <= 2**-16
    np.testing.assert_array_equal(packed(jnp.asarray(found)), sent)


def test_a_row_without_negatives_costs_nothing():
    rows, columns, *_ = _problem(1)
    columns = columns._replace(ids=columns.ids * 0)
    of = lambda embed: streaming.negatives(
        "softmax",
        False,
        9,
        Ring(),
        rows._replace(embed=embed, ids=rows.ids * 0),
        columns,
        20.0,
        0.0,
    )[0]
    (value, highest), pull = jax.vjp(of, rows.embed)
    assert np.all(value == -np.inf) and np.all(highest == np.float32(streaming.MASKED))
    assert not np.any(pull(streaming.Negatives(jnp.ones(M), jnp.ones(M)))[0])
    assert not np.any(streaming.loss_of_rows("softmax", np.ones(M, np.float32), value))


EVERY = dict(
    batch_size=32,
    text__pack_rows=12,
    input__negatives_per_region=2,
    loss__hard_negative=0.5,
    loss__tile=7,
    loss__image_description=0.7,
    model__boxes__kind="roi_align",
    loss__box_description=0.9,
)


@functools.cache
def _case(**overrides):
    c = tiny.config(**EVERY, **overrides)
    batch, outputs = tiny.batch(c), _outputs(c)
    batch.region_boxes_cxcywh[3, 1, 2] = 0  # a box without area
    batch.region_mask[4:8] = False  # images without regions: uneven shards
    batch = batch._replace(negative_mask=batch.negative_mask & batch.region_mask[..., None])
    if c.input.captions_per_image > 1:
        batch.caption_mask[8:11] = False  # images without captions
        batch.caption_id[1, 0] = batch.caption_id[30, 1]  # a text of two images, on two devices
    return c, batch, learnt(outputs, batch)._replace(logit_bias=np.float32(-2))


def _losses(c, batch, outputs, sizes):
    data, fsdp, tensor = sizes
    mesh = sharding.make_mesh(
        dataclasses.replace(c.mesh, data=data, fsdp=fsdp, tensor=tensor),
        jax.devices()[: math.prod(sizes)],
    )

    def run(outputs, batch):
        values = losses.total_loss(
            outputs, batch, c.loss, mesh=mesh, batch_axes=sharding.BATCH_AXES
        )
        return values.total, values

    place = sharding.batch_sharding(mesh)
    batch = jax.device_put(batch, place)
    (_, values), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(outputs, batch)
    return values, grads


@pytest.mark.parametrize(
    "sizes,group_size,gather,masked,captions",
    [
        ((4, 2, 1), 16, 2, True, 1),  # a group is four devices
        # A device holds two groups.
        pytest.param((8, 1, 1), 2, 4, False, 1, marks=pytest.mark.slow),
        ((2, 2, 2), 0, 2, True, 3),
        pytest.param((8, 1, 1), 0, 1, False, 2, marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_the_same_on_every_mesh(
    sizes, group_size, gather, masked, captions
):
    c, batch, outputs = _case(
        loss__group_size=group_size,
        loss__mask_duplicates=masked,
        input__captions_per_image=captions,
    )
    alone = _alone(c, batch, outputs)
    c = dataclasses.replace(c, loss=dataclasses.replace(c.loss, gather=gather))
    values, grads = _losses(c, batch, outputs, sizes)
    (ic, box, rd), measures = replica_and_measures(outputs, batch, c.loss)
    id_, measures["image_description_accuracy"] = image_description_replica(outputs, batch, c.loss)
    bd, measures["box_description_accuracy"] = box_description_replica(outputs, batch, c.loss)
    hard, right = hard_negative_replica(outputs, batch, c.loss)
    names = ("image_caption", "box", "region_description", "image_description", "box_description")
    found = [values.terms[name] for name in (*names, "hard_negative")]
    np.testing.assert_allclose(found, [ic, box, rd, id_, bd, hard], rtol=1e-5)
    assert_measures(values, measures | right)
    assert np.abs(alone.negative_text_embed).max() > 0
    _assert_gradients_equal(grads, alone)


def _alone(c, batch, outputs):
    """The gradient on one device, without a mesh."""
    total = lambda outputs: losses.total_loss(outputs, batch, c.loss).total
    return jax.jit(jax.grad(total))(outputs)


def _assert_gradients_equal(grads, expected):
    """Of Outputs; a field that a run has not got is None."""
    for name, a, b in zip(expected._fields, expected, grads, strict=True):
        if a is not None:
            np.testing.assert_allclose(
                b, a, rtol=1e-4, atol=1e-5 * max(np.abs(a).max(), 0.1), err_msg=name
            )


@pytest.mark.parametrize("captions", [1, 3])
def test_sigmoid_equals_a_float64_loop(captions):
    c, batch, outputs = _case(
        loss__contrast="sigmoid", model__logit_bias_init=-10.0, input__captions_per_image=captions
    )
    values, grads = _losses(c, batch, outputs, (4, 2, 1))
    o = jax.tree.map(lambda x: np.asarray(x, np.float64), outputs)
    softplus = lambda x: np.log1p(np.exp(x))
    if captions == 1:
        z = o.logit_scale * o.image_embed @ o.text_embed[:, 0].T + o.logit_bias
        same = batch.caption_id == batch.caption_id.T
        expected = (softplus(-np.diag(z)) + np.where(same, 0, softplus(z)).sum(1)).mean()
    else:
        texts = outputs.text_embed, batch.caption_id, batch.caption_mask
        expected, _ = positives_replica(outputs, *texts, c.loss)
    np.testing.assert_allclose(values.terms["image_caption"], expected, rtol=1e-5)

    # Regions: the softmax's matching, then every pair by itself.
    real = batch.region_mask & (batch.region_boxes_cxcywh[..., 2:] > 0).all(-1)
    cost = matching.cost_matrix(
        outputs.pred_boxes_cxcywh[-1], batch.region_boxes_cxcywh, l1=5.0, giou=2.0
    )
    found = matching.match(cost, real)
    i, j = np.nonzero(np.asarray(found.valid))
    rows = o.region_embed[i, np.asarray(found.query_index)[i, j]]
    z = o.logit_scale * rows @ o.region_text_embed[real].T + o.logit_bias
    ids = batch.description_id
    own = o.logit_scale * (rows * o.region_text_embed[i, j]).sum(-1) + o.logit_bias
    different = ids[i, j][:, None] != ids[real]
    expected = (softplus(-own) + np.where(different, softplus(z), 0).sum(1)).mean()
    np.testing.assert_allclose(values.terms["region_description"], expected, rtol=1e-5)
    expected, _ = image_description_replica(outputs, batch, c.loss)
    np.testing.assert_allclose(values.terms["image_description"], expected, rtol=1e-5)
    expected, _ = box_description_replica(outputs, batch, c.loss)
    np.testing.assert_allclose(values.terms["box_description"], expected, rtol=1e-5)

    _assert_gradients_equal(grads, _alone(c, batch, outputs))


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_images_without_a_caption_equal_the_replica_on_a_mesh(contrast):
    bias = dict(model__logit_bias_init=-2.0) if contrast == "sigmoid" else {}
    c, batch, outputs = _case(loss__contrast=contrast, **bias)
    mask = batch.caption_mask.copy()
    mask[8:11] = mask[30] = False
    batch = batch._replace(caption_mask=mask, caption_id=np.where(mask, batch.caption_id, 0))
    texts = outputs.text_embed, batch.caption_id, batch.caption_mask
    expected, _ = positives_replica(outputs, *texts, c.loss)
    values, grads = _losses(c, batch, outputs, (4, 2, 1))
    np.testing.assert_allclose(values.terms["image_caption"], expected, rtol=1e-5)
    assert not np.any(grads.text_embed[~mask[:, 0]]) and np.all(np.any(grads.image_embed, axis=-1))
    _assert_gradients_equal(grads, _alone(c, batch, outputs))


def test_groups_that_cross_devices_are_refused():
    c = tiny.config(batch_size=48)
    with pytest.raises(errors.UserError, match=r"loss.group_size: got 4, expected a divisor or a"):
        losses.make_layout(48, dataclasses.replace(c.loss, group_size=4), 8)
    with pytest.raises(errors.UserError, match=r"loss.gather: got 3, expected a divisor of the 8"):
        losses.make_layout(48, dataclasses.replace(c.loss, gather=3), 8)


PER_DEVICE, WIDTH = 2 * 13, 19  # no other product of sizes of the losses has these primes


def _config_of_gradient(gather, captions):
    return tiny.config(
        batch_size=8 * PER_DEVICE,
        loss__gather=gather,
        loss__tile=32,
        loss__image_description=1.0,
        loss__box_description=1.0,
        input__captions_per_image=captions,
        model__embed_dim=WIDTH,
        model__boxes__kind="roi_align",
    )


@functools.cache
def _program_of_gradient(gather, captions):
    """The compiled gradient of the losses on 8 devices."""
    c = _config_of_gradient(gather, captions)
    mesh = sharding.make_mesh(c.mesh)
    outputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _outputs(c, width=WIDTH)
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.batch(c))
    place = sharding.batch_sharding(mesh)
    cut = jax.tree.map(lambda x: place if x.ndim and x.ndim < 4 else None, outputs)
    cut = cut._replace(
        pred_boxes_cxcywh=jax.sharding.NamedSharding(mesh, PartitionSpec(None, *place.spec))
    )
    step = jax.jit(
        jax.grad(
            lambda o, b: (
                losses.total_loss(o, b, c.loss, mesh=mesh, batch_axes=sharding.BATCH_AXES).total
            )
        ),
        in_shardings=(cut, place),
        out_shardings=cut,
    )
    return step.lower(outputs, batch).compile().as_text()


RINGS = pytest.mark.parametrize(
    "gather,captions", [(1, 1), pytest.param(2, 1, marks=pytest.mark.slow), (2, 3)]
)


@RINGS
def test_memory_of_the_losses_does_not_hold_the_global_batch(gather, captions):
    """No buffer of the compiled value and gradient is as large as the batch, however its shape is spelt."""
    text = _program_of_gradient(gather, captions)
    slots = _config_of_gradient(gather, captions).input.max_regions
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
    assert permutes and ("all-gather" in text) == (gather > 1)
