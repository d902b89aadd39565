"""Contrastive loss of rows against the columns of all devices, in memory that does not grow with them.

Blocks of columns visit all devices (ring.py), and each device keeps running sums over their tiles, as
FlashAttention does (Dao et al. 2022). The backward pass computes the tiles again (a custom VJP). If rows and
columns both have a loss, columns travel in both passes, and their sums or gradients travel back to them. If
rows alone have one, the forward
pass sums their gradients, too, and in the backward pass the rows visit the columns: no gradient travels.
"""

import functools
import itertools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grain_jax.losses.ring import Block, Ring, exchange

MASKED = -1e30  # stands for -inf: a difference of two must not be NaN
NO_ID = -1


class Vectors(NamedTuple):
    """Rows or columns of the matrix of similarities."""

    embed: Float[Array, "k D"]
    ids: Int[Array, "k S"]  # NO_ID: none; vectors that share an id are no negatives
    real: Bool[Array, "k"]  # False: padding, a negative of nothing


class Negatives(NamedTuple):
    """What `negatives` returns for each row, or for each column."""

    cost: Float[Array, "m"]  # the negative part of the loss
    highest: Float[Array, "m"]  # logit of a negative, MASKED if there is none; no gradient


def similarity(a: Float[Array, "*n D"], b: Float[Array, "*m D"]) -> Array:
    """Every a . b over the last axis: [..., n, D], [..., m, D] -> float32 [..., n, m].

    At HIGHEST precision: on TPU the default would cut float32 operands to bfloat16.
    """
    return _product("...nd,...md->...nm", a, b, jax.lax.Precision.HIGHEST)


def _product(equation, a, b, precision):
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def negatives(
    contrast: str,
    both: bool,
    tile: int,
    ring: Ring,
    rows: Vectors,
    columns: Vectors,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> tuple[Negatives, Negatives | None]:
    """The negative part of the loss of the rows over the columns, and of the columns over the rows (`both`).

    With logits z = scale * row . column + bias the cost is log(sum(exp(z))) for "softmax", -inf without a
    negative, and sum(log(1 + exp(z))) for "sigmoid". See `loss_of_rows`.

    Args:
      contrast: "softmax" or "sigmoid".
      both: whether the columns have a cost, too; for "softmax". Let the smaller side be columns: they travel.
      tile: largest number of rows, and of columns, whose similarities are in memory at once.
      ring: the devices with the other rows and columns; outside `jax.shard_map`, the default.
      rows, columns: those on this device.
      scale: factor of the similarities.
      bias: added to the scaled similarities.
    """
    results: Any = _forward(contrast, both, tile, ring, rows, columns, scale, bias)[0]
    return results


def loss_of_rows(contrast: str, own_logit: Float[Array, "m"], cost: Float[Array, "m"]) -> Float[Array, "m"]:
    """The loss of each row from the logit of its own column (bias included) and the cost of `negatives`.

    softmax: log(exp(own) + exp(cost)) - own, InfoNCE. sigmoid: log(1 + exp(-own)) + cost, SigLIP
    (Zhai et al. 2023) without its division by the number of rows.
    """
    if contrast == "softmax":
        return jax.nn.softplus(cost - own_logit)
    return jax.nn.softplus(-own_logit) + cost


def _forward(contrast, both, tile, ring, rows, columns, scale, bias):
    def pair(rows, of_rows, columns, _, column_sums):
        sums, weight, vectors = of_rows
        logits = _logits(rows, columns, scale, bias, ring.precision)
        if both:
            column_sums = _add(contrast, column_sums, logits.T)[0]
            return column_sums, (_add(contrast, sums, logits)[0], None, None)
        sums, share, fade = _add(contrast, sums, logits)
        weight = weight * fade + share.sum(1)
        pulled = _product("nm,md->nd", share, columns.embed, ring.precision)
        return None, (sums, weight, vectors * fade[:, None] + pulled)

    row_tiles = cut(rows, tile)
    initial_sums = lambda x: _no_sums(x.real) if both else None
    weight = None if both else jnp.zeros(row_tiles.real.shape)
    vectors = None if both else jnp.zeros_like(row_tiles.embed)
    of_rows, column_sums = exchange(
        ring,
        _block(columns),
        functools.partial(_visit, pair, row_tiles, columns, tile, initial_sums),
        _add_sums,
        (_no_sums(row_tiles.real), weight, vectors),
        initial_sums(columns),
    )
    sums, weight, vectors = _joined(of_rows, len(rows.real))
    if contrast == "softmax" and not both:
        total = jnp.maximum(sums[:, 1], jnp.finfo(jnp.float32).tiny)
        weight, vectors = sums[:, 1] / total, vectors / total[:, None]
    results = tuple(x if x is None else _costs(contrast, x) for x in (sums, column_sums))
    costs = [None if x is None else x.cost for x in results]
    return results, (rows, columns, scale, bias, costs, weight, vectors)


def _backward(contrast, both, tile, ring, residuals, cotangents):
    """The gradients; those that are summed here are without the scale."""
    rows, columns, scale, bias, costs, weight, vectors = residuals
    of_rows, of_columns = (
        (cost, None if cotangent is None else cotangent.cost) for cost, cotangent in zip(costs, cotangents)
    )
    here, there = (rows, columns) if both else (columns, rows)  # `there` travels

    def pair(here, sums, there, of_there, back):
        (here, of_here), (gradient, weight) = here, sums
        logits = _logits(here, there, scale, bias, ring.precision)  # [here, there]
        share = _share(contrast, logits, *of_there)
        if both:
            share = _share(contrast, logits, *(x[:, None] for x in of_here)) + share
        share = jnp.where(logits > MASKED, share, 0)
        gradient += _product("nm,md->nd", share, there.embed, ring.precision)
        if both:
            back += _product("nm,nd->md", share, here.embed, ring.precision)
            weight += share.sum(1)
        return back, (gradient, weight)

    numbers: Any = of_columns if both else of_rows
    here_tiles = cut((here, of_rows if both else None), tile)
    initial_back = lambda x: jnp.zeros_like(x.embed) if both else None
    (gradient, of_bias), back = exchange(
        ring,
        _block(there, *numbers),
        functools.partial(_visit, pair, here_tiles, there, tile, initial_back),
        operator.add,
        (jnp.zeros_like(here_tiles[0].embed), jnp.zeros(here_tiles[0].real.shape) if both else None),
        initial_back(there),
    )
    gradient = _joined(gradient, len(here.real))
    of_rows, of_columns = gradient, back
    if not both:
        cotangent = cotangents[0].cost
        of_rows, of_columns, of_bias = cotangent[:, None] * vectors, gradient, cotangent * weight
    return (
        Vectors._make((scale * of_rows, None, None)),
        Vectors._make((scale * of_columns, None, None)),
        jnp.sum(rows.embed * of_rows),
        jnp.sum(of_bias),
    )


negatives.defvjp(_forward, _backward)


def _visit(pair, here, like: Vectors, tile: int, initial_back, state, block: Block):
    """The `visit` of `exchange`: the tiles `here`, each with its part of `state`, against a block's."""
    of_tile = functools.partial(_of_tile, pair, here, initial_back)
    state, back = jax.lax.scan(of_tile, state, _tiles(block, like, tile))
    return state, _joined(back, len(block.vectors))


def _of_tile(pair, here, initial_back, state, there):
    """All tiles here against one of the block: (state, what goes back with it)."""
    one_pair = lambda back, of_here: pair(*of_here, *there, back)
    back, state = jax.lax.scan(one_pair, initial_back(there[0]), (here, state))
    return state, back


def _logits(rows: Vectors, columns: Vectors, scale, bias, precision) -> Float[Array, "m k"]:
    """The logits, MASKED for pairs that are not each other's negatives."""
    pairs = itertools.product(rows.ids.T, columns.ids.T)
    same = ((x[:, None] == y) & (y != NO_ID) for x, y in pairs)
    allowed = columns.real & ~functools.reduce(operator.or_, same)
    logits = scale * _product("nd,md->nm", rows.embed, columns.embed, precision) + bias
    return jnp.where(allowed & rows.real[:, None], logits, MASKED)


def _share(contrast: str, logits, cost, cotangent):
    """The cotangent of each logit, from the cost of its row or column and the cotangent of that cost."""
    if contrast == "softmax":
        return cotangent * jnp.exp(logits - cost)
    return cotangent * jax.nn.sigmoid(logits)


def _no_sums(like):
    """Running sums [..., 2] of no logits: the largest, and the sum of exp(z - largest) or log(1 + exp(z))."""
    return jnp.stack([jnp.full(like.shape, MASKED), jnp.zeros(like.shape)], axis=-1)


def _add(contrast: str, sums, logits):
    """(sums [m, 2] with logits [m, k] added, derivative of the sum by each, factor of former derivatives)."""
    real = logits > MASKED
    highest = jnp.maximum(sums[:, 0], logits.max(1))
    if contrast == "sigmoid":
        share, fade = jax.nn.sigmoid(logits), jnp.ones_like(highest)
        added = jnp.where(real, jax.nn.softplus(logits), 0)
    else:
        share = added = jnp.exp(logits - highest[:, None])
        fade = jnp.exp(sums[:, 0] - highest)
    share, added = (jnp.where(real, x, 0) for x in (share, added))
    return jnp.stack([highest, sums[:, 1] * fade + added.sum(1)], axis=-1), share, fade


def _add_sums(a, b):
    """Running sums [m, 2] of both, for "softmax"."""
    highest = jnp.maximum(a[:, 0], b[:, 0])
    total = a[:, 1] * jnp.exp(a[:, 0] - highest) + b[:, 1] * jnp.exp(b[:, 0] - highest)
    return jnp.stack([highest, total], axis=-1)


def _costs(contrast: str, sums) -> Negatives:
    highest, total = sums.T
    return Negatives(total if contrast == "sigmoid" else highest + jnp.log(total), highest)


def _block(vectors: Vectors, *numbers: Float[Array, "k"]) -> Block:
    """What travels: the vectors, and float32 numbers beside them."""
    as_ints = (jax.lax.bitcast_convert_type(x, jnp.int32)[:, None] for x in numbers)
    labels = vectors.ids, vectors.real[:, None].astype(jnp.int32), *as_ints
    return Block(vectors.embed, jnp.concatenate(labels, axis=1))


def _tiles(block: Block, like: Vectors, tile: int) -> tuple[Vectors, tuple[Array, ...]]:
    """Tiles of a block, whose vectors have as many ids as `like`, and of the numbers beside them."""
    embed, labels = cut(tuple(block), tile)
    ids, real, numbers = jnp.split(labels, [n := like.ids.shape[1], n + 1], axis=-1)
    numbers = jax.lax.bitcast_convert_type(jnp.moveaxis(numbers, -1, 0), jnp.float32)
    return Vectors(embed, ids, real[..., 0] > 0), tuple(numbers)


def cut(tree, tile: int):
    """[m, ...] -> [tiles, at most `tile`, ...], padded with zeros to equal tiles."""

    def cut_array(x):
        tiles = max(1, math.ceil(len(x) / tile))
        size = max(1, math.ceil(len(x) / tiles))
        x = jnp.pad(x, ((0, tiles * size - len(x)), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(tiles, size, *x.shape[1:])

    return jax.tree.map(cut_array, tree)


def _joined(tree, count: int):
    """The inverse of `cut`, of `count` vectors."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], tree)
