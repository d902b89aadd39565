"""Contrastive loss of rows against the columns of all devices, in memory that does not grow with their number.

Columns travel round the ring of devices a block at a time. Each device keeps running sums over the blocks,
which it cuts into tiles. The sums give the loss of each row and, as in FlashAttention (Dao et al. 2022), its
gradient. In the backward pass the rows travel, and each device sums the gradient of its own columns: tiles are
computed again (a custom VJP), and no gradient travels. All of this runs inside `jax.shard_map`.

With k rows and columns of D values on each of n devices, a device holds about 4 k D + a few tile^2 numbers. It
sends n k D numbers in the forward pass and as many in the backward pass.

Where both sides have a loss (`negatives_of_both`), one of them travels, with what the devices found out about it: the
running sums of its softmax in the forward pass, its gradient in the backward pass. With m rows and k columns on each
of n devices that is 3 n k D numbers instead of 2 n (m + k) D, and half of the products of two rings.
"""

import functools
import itertools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grain_jax.losses.ring import Ring, TravellingBlock, stream, stream_and_return

MASKED = -1e30  # stands for -inf where a difference of two must not be NaN


class IdSet(NamedTuple):
    """Several ids of each row, or of each column."""

    id: Int[Array, "m S"]
    listed: Bool[Array, "m S"]  # False: padding


class Columns(NamedTuple):
    """What rows are compared with."""

    embed: Float[Array, "k D"]
    id: Int[Array, "k"] | IdSet  # a column is no negative of the rows with which it shares an id
    real: Bool[Array, "k"]  # False: padding, a negative of no row


class Negatives(NamedTuple):
    """Per-row results of `negatives`."""

    cost: Float[Array, "m"]  # the negative term of the loss
    highest: Float[Array, "m"]  # logit of a negative, MASKED where there is none; no gradient


def similarity(a: Float[Array, "*n D"], b: Float[Array, "*m D"]) -> Array:
    """Every a . b over the last axis: [..., n, D], [..., m, D] -> float32 [..., n, m].

    At HIGHEST precision: on TPU the default would cut float32 operands to bfloat16.
    """
    return product("...nd,...md->...nm", a, b, jax.lax.Precision.HIGHEST)


def product(equation, a, b, precision):
    """`jnp.einsum` of two arrays in float32, at that precision of its products."""
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def negatives(
    contrast: str,
    tile: int,
    ring: Ring,
    rows: Float[Array, "m D"],
    row_id: Int[Array, "m"] | IdSet,
    columns: Columns,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> Negatives:
    """Per-row negative term of the loss: over the real columns of the ring that share no id with the row.

    With logits z = scale * row . column + bias the cost is log(sum(exp(z))) for "softmax", -inf where a
    row has no negative, and sum(log(1 + exp(z))) for "sigmoid". See `loss_of_rows`.

    Args:
      contrast: "softmax" or "sigmoid".
      tile: largest number of rows, and of columns, whose similarities are in memory at once.
      ring: the devices with the other columns; outside of `jax.shard_map`, the default.
      rows: those on this device.
      row_id: columns with this id, or one of these, are no negatives of the row.
      columns: those on this device.
      scale: factor of the similarities.
      bias: added to the scaled similarities.
    """
    return _forward(contrast, tile, ring, rows, row_id, columns, scale, bias)[0]


def loss_of_rows(
    contrast: str, own_logit: Float[Array, "m"], cost: Float[Array, "m"]
) -> Float[Array, "m"]:
    """The loss of each row from the logit of its own column (bias included) and the cost of `negatives`.

    softmax: log(exp(own) + exp(cost)) - own, InfoNCE. sigmoid: log(1 + exp(-own)) + cost, SigLIP
    (Zhai et al. 2023) without its division by the number of rows.
    """
    if contrast == "softmax":
        return jax.nn.softplus(cost - own_logit)
    return jax.nn.softplus(-own_logit) + cost


def _forward(contrast, tile, ring, rows, row_id, columns, scale, bias):
    row_tiles = cut((rows, row_id), tile)
    logits_of = functools.partial(_logits, scale=scale, bias=bias, precision=ring.precision)

    def update(sums, block):
        tiles, _ = _read_columns(block, columns.id, tile)

        def one_tile(sums, columns):
            def one_row_tile(part):
                (x, x_id), state = part
                logits, allowed = logits_of(x, x_id, columns)
                return _accumulate(contrast, state, logits, allowed, columns, ring.precision)

            return jax.lax.map(one_row_tile, (row_tiles, sums)), None

        return jax.lax.scan(one_tile, sums, tiles)[0]

    shape = row_tiles[0].shape[:2]
    nothing = _Sums(
        jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(shape), jnp.zeros_like(row_tiles[0])
    )
    labels = jnp.concatenate([label_rows(columns.id), columns.real[None].astype(jnp.int32)])
    sums = stream(ring, TravellingBlock(columns.embed, labels), update, nothing)
    sums = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(rows)], sums)
    out, weight, mean = sums.total, sums.weight, sums.vectors
    if contrast == "softmax":
        out = sums.highest + jnp.log(sums.total)
        some = jnp.maximum(sums.total, jnp.finfo(jnp.float32).tiny)
        weight, mean = sums.total / some, sums.vectors / some[:, None]
    residuals = rows, row_id, columns, scale, bias, out, weight, mean
    return Negatives(out, sums.highest), residuals


def _backward(contrast, tile, ring, residuals, cotangents):
    rows, row_id, columns, scale, bias, out, weight, mean = residuals
    cotangent = cotangents.cost
    column_tiles = Columns(*cut(tuple(columns), tile))
    logits_of = functools.partial(_logits, scale=scale, bias=bias, precision=ring.precision)

    def update(column_gradients, block):
        """Adds the gradients that the rows of a block give to this device's columns, without the scale."""
        row_tiles = cut((block.vectors, block.labels.T), tile)

        def one_tile(column_gradients, rows):
            x, labels = rows
            x_id, numbers = read_ids(labels, row_id)
            x_out, x_cotangent = jax.lax.bitcast_convert_type(numbers, jnp.float32).T

            def one_column_tile(part):
                columns, gradients = part
                logits, allowed = logits_of(x, x_id, columns)
                if contrast == "softmax":
                    share = jnp.exp(logits - x_out[:, None])
                else:
                    share = jax.nn.sigmoid(logits)
                share = jnp.where(allowed, share * x_cotangent[:, None], 0)  # [rows, columns]
                return gradients + product("nm,nd->md", share, x, ring.precision)

            return jax.lax.map(one_column_tile, (column_tiles, column_gradients)), None

        return jax.lax.scan(one_tile, column_gradients, row_tiles)[0]

    as_int = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)
    numbers = jnp.stack([as_int(out), as_int(cotangent)])
    block = TravellingBlock(rows, jnp.concatenate([label_rows(row_id), numbers]))
    column_gradients = stream(ring, block, update, jnp.zeros_like(column_tiles.embed))
    column_gradients = column_gradients.reshape(-1, rows.shape[-1])[: len(columns.embed)]
    row_gradients = cotangent[:, None] * mean
    return (
        scale * row_gradients,
        None,
        Columns._make((scale * column_gradients, None, None)),
        jnp.sum(rows * row_gradients),
        jnp.sum(cotangent * weight),
    )


negatives.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def negatives_of_both(
    tile: int,
    ring: Ring,
    rows: Columns,
    columns: Columns,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> tuple[Negatives, Negatives]:
    """The softmax costs of the rows over the columns and of the columns over the rows, in one pass of the ring.

    As `negatives(rows, columns)` and `negatives(columns, rows)` for "softmax". The columns travel: let them be the
    smaller side.

    Args:
      tile: largest number of rows, and of columns, whose similarities are in memory at once.
      ring: the devices with the other columns and rows; outside of `jax.shard_map`, the default.
      rows: those on this device; one that is not real is no negative of the columns, and has none.
      columns: those on this device, likewise.
      scale: factor of the similarities.
      bias: added to the scaled similarities.

    Returns:
      Of the rows, and of the columns.
    """
    return _forward_of_both(tile, ring, rows, columns, scale, bias)[0]


def _forward_of_both(tile, ring, rows, columns, scale, bias):
    row_tiles = cut(rows, tile)
    logits_of = functools.partial(_logits_of_both, scale=scale, bias=bias, precision=ring.precision)

    def visit(row_sums, block):
        """Adds a block to the sums of the rows; the sums of its columns over these rows, [k, 2]."""
        column_tiles, _ = _read_columns(block, columns.id, tile)

        def one_tile(row_sums, columns):
            def one_row_tile(column_sum, part):
                rows, row_sum = part
                logits = logits_of(rows, columns)
                return _add_logits(column_sum, logits.T), _add_logits(row_sum, logits)

            nothing = _no_logits(columns.embed.shape[:1])
            column_sum, row_sums = jax.lax.scan(one_row_tile, nothing, (row_tiles, row_sums))
            return row_sums, column_sum

        row_sums, found = jax.lax.scan(one_tile, row_sums, column_tiles)
        return row_sums, found.reshape(-1, 2)[: len(block.vectors)]

    labels = jnp.concatenate([label_rows(columns.id), columns.real[None].astype(jnp.int32)])
    row_sums, column_sums = stream_and_return(
        ring,
        TravellingBlock(columns.embed, labels),
        visit,
        _add_sums,
        _no_logits(row_tiles.real.shape),
        _no_logits(columns.real.shape),
    )
    if ring.gather is not None:
        highest = jax.lax.pmax(column_sums[:, 0], ring.gather)
        totals = column_sums[:, 1] * jnp.exp(column_sums[:, 0] - highest)
        column_sums = jnp.stack([highest, jax.lax.psum(totals, ring.gather)], axis=-1)
        start = jax.lax.axis_index(ring.gather) * len(columns.real)
        column_sums = jax.lax.dynamic_slice_in_dim(column_sums, start, len(columns.real))
    row_sums = row_sums.reshape(-1, 2)[: len(rows.real)]
    read = lambda sums: Negatives(sums[:, 0] + jnp.log(sums[:, 1]), sums[:, 0])
    of_rows, of_columns = read(row_sums), read(column_sums)
    return (of_rows, of_columns), (rows, columns, scale, bias, of_rows.cost, of_columns.cost)


def _backward_of_both(tile, ring, residuals, cotangents):
    rows, columns, scale, bias, row_cost, column_cost = residuals
    row_tiles, row_costs, row_cotangents = cut((rows, row_cost, cotangents[0].cost), tile)
    logits_of = functools.partial(_logits_of_both, scale=scale, bias=bias, precision=ring.precision)

    def visit(of_rows, block):
        """Adds the gradients from a block to those of the rows; those of its columns, [k, D]; without the scale."""
        column_tiles, numbers = _read_columns(block, columns.id, tile)
        costs, cotangents = jnp.moveaxis(jax.lax.bitcast_convert_type(numbers, jnp.float32), -1, 0)

        def one_tile(of_rows, part):
            columns, cost, cotangent = part

            def one_row_tile(column_gradient, part):
                rows, row_cost, row_cotangent, (row_gradient, weight) = part
                logits = logits_of(rows, columns)
                share = row_cotangent[:, None] * jnp.exp(logits - row_cost[:, None])
                share += cotangent * jnp.exp(logits - cost)
                share = jnp.where(logits > MASKED, share, 0)  # [rows, columns]
                row_gradient += product("nm,md->nd", share, columns.embed, ring.precision)
                column_gradient += product("nm,nd->md", share, rows.embed, ring.precision)
                return column_gradient, (row_gradient, weight + share.sum(1))

            turns = row_tiles, row_costs, row_cotangents, of_rows
            column_gradient, of_rows = jax.lax.scan(
                one_row_tile, jnp.zeros_like(columns.embed), turns
            )
            return of_rows, column_gradient

        of_rows, found = jax.lax.scan(one_tile, of_rows, (column_tiles, costs, cotangents))
        return of_rows, found.reshape(-1, found.shape[-1])[: len(block.vectors)]

    as_int = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)[None]
    real = columns.real[None].astype(jnp.int32)
    numbers = as_int(column_cost), as_int(cotangents[1].cost)
    labels = jnp.concatenate([label_rows(columns.id), real, *numbers])
    (row_gradients, weights), column_gradients = stream_and_return(
        ring,
        TravellingBlock(columns.embed, labels),
        visit,
        operator.add,
        (jnp.zeros_like(row_tiles.embed), jnp.zeros_like(row_costs)),
        jnp.zeros_like(columns.embed),
    )
    if ring.gather is not None:
        column_gradients = jax.lax.psum_scatter(column_gradients, ring.gather, tiled=True)
    row_gradients = row_gradients.reshape(-1, rows.embed.shape[-1])[: len(rows.real)]
    return (
        Columns._make((scale * row_gradients, None, None)),
        Columns._make((scale * column_gradients, None, None)),
        jnp.sum(rows.embed * row_gradients),
        jnp.sum(weights),
    )


negatives_of_both.defvjp(_forward_of_both, _backward_of_both)


class _Sums(NamedTuple):
    """Running sums of each row over its negatives; those of a softmax are divided by exp(highest)."""

    highest: Array  # [m] largest logit
    total: Array  # [m] sum of exp(z), or of log(1 + exp(z))
    weight: Array  # [m] sum of the derivatives of `total` by z
    vectors: Array  # [m, D] sum of the columns times these derivatives


def _logits(rows, row_id, columns, *, scale, bias, precision):
    allowed = columns.real & ~share_an_id(row_id, columns.id)
    return scale * product("nd,md->nm", rows, columns.embed, precision) + bias, allowed


def _logits_of_both(rows: Columns, columns: Columns, *, scale, bias, precision):
    """[m, k], MASKED where a row and a column are not each other's negatives."""
    logits, allowed = _logits(
        rows.embed, rows.id, columns, scale=scale, bias=bias, precision=precision
    )
    return jnp.where(allowed & rows.real[:, None], logits, MASKED)


def _no_logits(shape):
    """Running sums of no logits: [..., 2], the largest, and the sum of exp(z - largest)."""
    return jnp.stack([jnp.full(shape, MASKED), jnp.zeros(shape)], axis=-1)


def _add_logits(sums, logits):
    """Running sums [m, 2] with logits [m, k] added."""
    highest = logits.max(1)
    share = jnp.where(logits > MASKED, jnp.exp(logits - highest[:, None]), 0)
    return _add_sums(sums, jnp.stack([highest, share.sum(1)], axis=-1))


def _add_sums(a, b):
    """Running sums [m, 2] of both."""
    highest = jnp.maximum(a[:, 0], b[:, 0])
    totals = (x[:, 1] * jnp.exp(x[:, 0] - highest) for x in (a, b))
    return jnp.stack([highest, functools.reduce(operator.add, totals)], axis=-1)


def _read_columns(block: TravellingBlock, form, tile: int):
    """(tiles of the columns of a block, with ids in the form of others; their further labels, [tiles, k, n])."""
    embed, labels = cut((block.vectors, block.labels.T), tile)
    ids, numbers = read_ids(labels, form)
    return Columns(embed, ids, numbers[..., 0] > 0), numbers[..., 1:]  # padding is not real


def share_an_id(a, b):
    """[m], [k], or sets of either, to [m, k]."""

    def members(ids):
        """(ids, where they count) of each place of the sets."""
        if isinstance(ids, IdSet):
            return [(ids.id[:, n], ids.listed[:, n]) for n in range(ids.id.shape[1])]
        return [(ids, None)]

    found = []
    for (x, of_x), (y, of_y) in itertools.product(members(a), members(b)):
        same = x[:, None] == y
        same = same if of_x is None else same & of_x[:, None]
        found.append(same if of_y is None else same & of_y)
    return functools.reduce(operator.or_, found)


def label_rows(ids):
    """What of a block's labels says its ids: int32 [n, k]."""
    if isinstance(ids, IdSet):
        return jnp.concatenate([ids.id.T, ids.listed.T.astype(jnp.int32)])
    return ids[None]


def read_ids(labels, form):
    """(the ids, in the form of others, and what follows them) of labels [..., n]."""
    if isinstance(form, IdSet):
        size = form.id.shape[-1]
        ids = IdSet(labels[..., :size], labels[..., size : 2 * size] > 0)
        return ids, labels[..., 2 * size :]
    return labels[..., 0], labels[..., 1:]


def _accumulate(contrast, state: _Sums, logits, allowed, columns: Columns, precision) -> _Sums:
    """The sums with a tile of columns added."""
    highest, total, weight, vectors = state
    higher = jnp.maximum(highest, jnp.where(allowed, logits, MASKED).max(1))
    if contrast == "sigmoid":
        share = jnp.where(allowed, jax.nn.sigmoid(logits), 0)
        total += jnp.where(allowed, jax.nn.softplus(logits), 0).sum(1)
    else:
        share = jnp.where(allowed, jnp.exp(logits - higher[:, None]), 0)
        fade = jnp.exp(highest - higher)
        total = total * fade + share.sum(1)
        weight, vectors = weight * fade, vectors * fade[:, None]
    weight += share.sum(1)
    vectors += product("nm,md->nd", share, columns.embed, precision)
    return _Sums(higher, total, weight, vectors)


def cut(tree, tile: int):
    """[m, ...] -> [tiles, at most `tile`, ...], padded with zeros to equal tiles."""

    def one(x):
        tiles = max(1, math.ceil(len(x) / tile))
        size = max(1, math.ceil(len(x) / tiles))
        x = jnp.pad(x, ((0, tiles * size - len(x)), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(tiles, size, *x.shape[1:])

    return jax.tree.map(one, tree)
