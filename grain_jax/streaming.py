"""Contrast of rows against all columns of all devices, in memory that does not grow with their number.

Columns travel round the ring of devices a block at a time, while each device keeps a running sum over
what passes by; within a device a block is cut into tiles. The backward pass computes the tiles again,
with the gradients of the columns travelling behind the columns (a custom VJP), so that nothing of the
forward pass but one number a row is kept. All of this runs inside `jax.shard_map`.

With blocks of k columns of D values on n devices, a device holds about 4 k D + tile^2 numbers and sends
n k D of them forward, 2 n k D backward. Where a `Ring` gathers, g neighbours first share their columns:
g times the memory, a g-th of the hops, each of g times the size.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # stands for -inf where a difference of two must not be NaN


class Ring(NamedTuple):
    """Which mesh axes columns travel over; the default is one device."""

    axes: tuple[str, ...] = ()  # hop by hop
    size: int = 1  # devices along them
    gather: str | None = None  # the axis whose devices share their columns before the first hop


class Columns(NamedTuple):
    """What rows are compared with."""

    embed: Float[Array, "k D"]
    id: Int[Array, "k"]  # a row never meets the columns that have its own id
    real: Bool[Array, "k"]  # padding is nobody's negative


def similarity(a: Float[Array, "*n D"], b: Float[Array, "*m D"]) -> Array:
    """Every a . b over the last axis: [..., n, D], [..., m, D] -> float32 [..., n, m].

    At HIGHEST precision: on TPU the default would cut float32 operands to bfloat16.
    """
    return _product("...nd,...md->...nm", a, b)


def _product(equation, a, b):
    return jnp.einsum(
        equation,
        a,
        b,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def negatives(
    contrast: str,
    tile: int,
    ring: Ring,
    rows: Float[Array, "m D"],
    row_id: Int[Array, "m"],
    columns: Columns,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> Float[Array, "m"]:
    """What each row owes to its negatives, the real columns of the ring whose id is not its own.

    With logits z = scale * row . column + bias this is log(sum(exp(z))) for "softmax", -inf where a row
    has no negative, and sum(log(1 + exp(z))) for "sigmoid". See `loss_of_rows`.

    Args:
      contrast: "softmax" or "sigmoid".
      tile: most rows and columns whose similarities are in memory at once.
      ring: where the other columns are; outside of `jax.shard_map`, the default.
      rows: this device's.
      row_id: id of the columns that are no negatives of the row.
      columns: this device's.
      scale: of the similarities.
      bias: added to them.
    """
    return _forward(contrast, tile, ring, rows, row_id, columns, scale, bias)[0]


def loss_of_rows(
    contrast: str, own_logit: Float[Array, "m"], negative: Float[Array, "m"]
) -> Float[Array, "m"]:
    """The loss of rows with that logit (bias included) of their own column and those `negatives`.

    softmax: log(exp(own) + exp(negative)) - own, InfoNCE. sigmoid: log(1 + exp(-own)) + negative, SigLIP
    (Zhai et al. 2023) without its division by the number of rows.
    """
    if contrast == "softmax":
        return jax.nn.softplus(negative - own_logit)
    return jax.nn.softplus(-own_logit) + negative


def _forward(contrast, tile, ring, rows, row_id, columns, scale, bias):
    row_tiles = _cut((rows, row_id), tile)

    def update(sums, columns):
        def one_tile(sums, column_tile):
            def one_row_tile(part):
                (x, x_id), state = part
                logits, allowed = _logits(x, x_id, column_tile, scale, bias)
                return _accumulate(contrast, state, logits, allowed)

            return jax.lax.map(one_row_tile, (row_tiles, sums)), None

        return jax.lax.scan(one_tile, sums, _cut_columns(columns, tile))[0]

    shape = row_tiles[1].shape
    sums = jnp.full(shape, MASKED), jnp.zeros(shape)
    columns_here = _gather(ring, columns)
    if ring.size > 1:

        def turn(carry, _):
            sums, columns = carry
            coming = _pass_on(ring, columns)  # does not wait for the tiles
            return (update(sums, columns), coming), None

        (sums, columns_here), _ = jax.lax.scan(
            turn, (sums, columns_here), None, length=ring.size - 1
        )
    highest, total = (x.reshape(-1)[: len(rows)] for x in update(sums, columns_here))
    out = total if contrast == "sigmoid" else highest + jnp.log(total)
    return out, (rows, row_id, columns, scale, bias, out)


def _backward(contrast, tile, ring, residuals, cotangent):
    rows, row_id, columns, scale, bias, out = residuals
    row_tiles = _cut((rows, row_id, out, cotangent), tile)

    def update(pulls, columns):
        """Adds to `pulls` of the rows; returns them and the gift to the columns, scale left out."""

        def one_tile(pulls, column_tile):
            def one_row_tile(gift, part):
                (x, x_id, x_out, x_cotangent), (pull, count) = part
                logits, allowed = _logits(x, x_id, column_tile, scale, bias)
                if contrast == "softmax":
                    share = jnp.exp(logits - x_out[:, None])
                else:
                    share = jax.nn.sigmoid(logits)
                share = jnp.where(allowed, share * x_cotangent[:, None], 0)  # [rows, columns]
                pull += _product("nm,md->nd", share, column_tile.embed)
                gift += _product("nm,nd->md", share, x)
                return gift, (pull, count + share.sum(1))

            nothing = jnp.zeros_like(column_tile.embed)
            gift, pulls = jax.lax.scan(one_row_tile, nothing, (row_tiles, pulls))
            return pulls, gift

        pulls, gifts = jax.lax.scan(one_tile, pulls, _cut_columns(columns, tile))
        return pulls, gifts.reshape(-1, gifts.shape[-1])[: len(columns.embed)]

    pulls = jnp.zeros_like(row_tiles[0]), jnp.zeros(row_tiles[1].shape)
    columns_here = _gather(ring, columns)
    gift = jnp.zeros_like(columns_here.embed)
    if ring.size > 1:
        # A block's gift follows it one turn behind: what was added to it in the last turn travels
        # while the tiles of this one are computed.
        def turn(carry, _):
            pulls, columns, gift = carry
            coming, arrived = _pass_on(ring, columns), _pass_on(ring, gift)
            pulls, added = update(pulls, columns)
            return (pulls, coming, arrived + added), None

        (pulls, columns_here, gift), _ = jax.lax.scan(
            turn, (pulls, columns_here, gift), None, length=ring.size - 1
        )
        gift = _pass_on(ring, gift)
    pulls, added = update(pulls, columns_here)
    gift = gift + added
    if ring.size > 1:
        gift = _pass_on(ring, gift)  # home
    if ring.gather:
        gift = jax.lax.psum_scatter(gift, ring.gather, tiled=True)
    pull, count = pulls
    pull = pull.reshape(-1, rows.shape[-1])[: len(rows)]
    return (
        scale * pull,
        None,
        Columns(scale * gift, None, None),
        jnp.sum(rows * pull),
        count.sum(),
    )


negatives.defvjp(_forward, _backward)


def _logits(rows, row_id, columns, scale, bias):
    allowed = columns.real & (row_id[:, None] != columns.id)
    return scale * similarity(rows, columns.embed) + bias, allowed


def _accumulate(contrast, state, logits, allowed):
    """The running (highest logit, sum of exponentials below it), or (not used, sum)."""
    highest, total = state
    if contrast == "sigmoid":
        return highest, total + jnp.where(allowed, jax.nn.softplus(logits), 0).sum(1)
    logits = jnp.where(allowed, logits, MASKED)
    higher = jnp.maximum(highest, logits.max(1))
    terms = jnp.where(allowed, jnp.exp(logits - higher[:, None]), 0)
    return higher, total * jnp.exp(highest - higher) + terms.sum(1)


def _cut(tree, tile: int):
    """[m, ...] -> [tiles, at most `tile`, ...], padded with zeros to equal tiles."""

    def cut(x):
        tiles = max(1, math.ceil(len(x) / tile))
        size = max(1, math.ceil(len(x) / tiles))
        x = jnp.pad(x, ((0, tiles * size - len(x)), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(tiles, size, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _cut_columns(columns: Columns, tile: int) -> Columns:
    return Columns(*_cut(tuple(columns), tile))  # padding is not `real`


def _gather(ring: Ring, columns: Columns) -> Columns:
    if ring.gather is None:
        return columns
    return jax.tree.map(lambda x: jax.lax.all_gather(x, ring.gather, tiled=True), columns)


def _pass_on(ring: Ring, tree):
    """Everybody's block to the next device of the ring."""
    hops = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axes, hops), tree)
