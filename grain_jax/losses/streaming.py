"""The negatives of rows among the columns of all devices, in memory that does not grow with their product.

Every device holds the columns of all devices (`gathered`) and compares its own rows with them, a tile of
columns at a time. The backward pass computes the tiles again, as FlashAttention does (Dao et al. 2022), and
the transpose of the gather brings the gradients of the columns home.

For example, devices A and B have two rows and two columns each, and tiles have two columns:

    device A   rows a1 a2   tile 1: columns a1 a2   tile 2: columns b1 b2
    device B   rows b1 b2   tile 1: columns a1 a2   tile 2: columns b1 b2

1. A gets log(sum(exp(z))) of each row over tile 1 [2] and over tile 2 [2]; their logsumexp is the cost of
   its rows [2].
2. A also gets log(sum(exp(z))) of each column over its two rows, [4] for all tiles; so does B. The logsumexp
   of both is the cost of the columns. A keeps the cost of a1 and a2 [2], B of b1 and b2 [2].
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # stands for -inf: a difference of two must not be NaN
NO_ID = -1


class Columns(NamedTuple):
    """Vectors that rows are compared with."""

    embed: Float[Array, "k D"]
    ids: Int[Array, "k"]  # NO_ID: none
    real: Bool[Array, "k n"]  # False: a negative of no row that uses this mask


class Rows(NamedTuple):
    """Vectors of this device that look for their negatives among the columns."""

    embed: Float[Array, "m D"]
    ids: Int[Array, "m S"]  # NO_ID: none; a column with one of them is not used as a negative
    real: Bool[Array, "m"]  # False: padding, not used as a negative
    scale: Float[Array, ""]  # of the similarities
    bias: Float[Array, ""]
    mask: int = 0  # which of the columns' masks
    both: bool = False  # whether the columns have a cost, too


class Negatives(NamedTuple):
    """The negatives of each of n rows or columns, with logits z = scale * row . column + bias."""

    cost: Float[Array, "n"]  # softmax: log(sum(exp(z))). sigmoid: sum(log(1 + exp(z)))
    highest: Float[Array, "n"]  # z of the nearest one, MASKED if there is none; no gradient


Pair = tuple[Negatives, Negatives | None]  # of rows, and of this device's columns


def similarity(
    a: Float[Array, "*n D"], b: Float[Array, "*m D"], precision=jax.lax.Precision.HIGHEST
) -> Array:
    """Every a . b over the last axis: [..., n, D], [..., m, D] -> float32 [..., n, m].

    At HIGHEST precision: on TPU the default would cut float32 operands to bfloat16.
    """
    equation = "...nd,...md->...nm"
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def loss_of_rows(contrast: str, own_logit: Float[Array, "m"], cost: Float[Array, "m"]) -> Float[Array, "m"]:
    """The loss of each row from the logit of its own column (bias included) and the cost of its negatives.

    softmax: log(exp(own) + exp(cost)) - own, InfoNCE. sigmoid: log(1 + exp(-own)) + cost, SigLIP
    (Zhai et al. 2023) without its division by the number of rows.
    """
    if contrast == "softmax":
        return jax.nn.softplus(cost - own_logit)
    return jax.nn.softplus(-own_logit) + cost


def gathered(columns: Columns, axes: tuple[str, ...]) -> Columns:
    """The columns of all devices along these mesh axes, in their order.

    The embeddings travel while the image tower computes. libtpu runs one such transfer at a time, so ids and
    masks wait for the embeddings: they are there first, and would take its place.
    """
    if not axes:
        return columns
    embed, *others = columns
    _, *others = jax.lax.optimization_barrier((jax.lax.stop_gradient(embed), *others))
    columns = Columns(embed, *others)
    return jax.tree.map(functools.partial(jax.lax.all_gather, axis_name=axes, tiled=True), columns)


def plain_negatives(contrast: str, rows: Rows, columns: Columns, precision: jax.lax.Precision) -> Pair:
    """The negatives on one device, with the whole matrix of logits [m, k]."""
    same = ((x[:, None] == columns.ids) & (columns.ids != NO_ID) for x in rows.ids.T)  # S times [m, k]
    is_negative = columns.real[:, rows.mask] & rows.real[:, None] & ~functools.reduce(operator.or_, same)
    z = rows.scale * similarity(rows.embed, columns.embed, precision) + rows.bias  # [m, k]
    z = jnp.where(is_negative, z, MASKED)
    highest = jax.lax.stop_gradient(z)
    cost = functools.partial(jax.nn.logsumexp, z)
    if contrast == "sigmoid":
        cost = functools.partial(jnp.sum, jax.nn.softplus(z))
    of_rows, of_columns = (Negatives(cost(axis=axis), highest.max(axis)) for axis in (1, 0))
    return of_rows, of_columns if rows.both else None


def negatives(
    contrast: str,
    rows: Sequence[Rows],
    columns: Columns,
    *,
    tile: int = 1024,
    axes: tuple[str, ...] = (),
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> list[Pair]:
    """The negatives of several sets of rows, in one pass over the columns.

    Args:
      contrast: "softmax" or "sigmoid".
      rows: of this device.
      columns: of all devices (`gathered`).
      tile: a matrix of logits in memory has at most its square.
      axes: mesh axes of the devices inside `jax.shard_map`, () for one device.
      precision: of the products.
    """
    most, count = max(len(x.embed) for x in rows), len(columns.embed)
    tiles = math.ceil(most * count / tile**2)
    tiles = next((n for n in range(tiles, 2 * tiles) if count % n == 0), tiles)  # a copy fills unequal ones
    if tiles <= 1 and not axes:
        return [plain_negatives(contrast, x, columns, precision) for x in rows]

    @jax.checkpoint
    def of_tile(columns: Columns) -> list[Pair]:
        return [plain_negatives(contrast, x, columns, precision) for x in rows]

    by_tile = jax.lax.map(of_tile, _cut(columns, max(tiles, 1)))
    return [
        (_over_tiles(contrast, x), None if y is None else _own(contrast, y, count, axes)) for x, y in by_tile
    ]


def _cut(columns: Columns, tiles: int) -> Columns:
    """[k, ...] -> [tiles, k / tiles, ...], padded with columns that are not real."""
    size = math.ceil(len(columns.embed) / tiles)
    padding = tiles * size - len(columns.embed)
    fill = lambda x: jnp.pad(x, [(0, padding), *itertools.repeat((0, 0), x.ndim - 1)])
    return jax.tree.map(lambda x: fill(x).reshape(tiles, size, *x.shape[1:]), columns)


def _over_tiles(contrast: str, by_tile: Negatives) -> Negatives:
    """The negatives of rows [m] from those in each tile [tiles, m]."""
    join = jnp.sum if contrast == "sigmoid" else jax.nn.logsumexp
    return Negatives(join(by_tile.cost, axis=0), by_tile.highest.max(0))


def _own(contrast: str, by_tile: Negatives, count: int, axes: tuple[str, ...]) -> Negatives:
    """The negatives of this device's columns among the rows of all devices, from those here [tiles, k]."""
    cost, highest = (x.reshape(-1)[:count] for x in by_tile)  # of the columns of all devices
    if not axes:
        return Negatives(cost, highest)
    highest = jax.lax.pmax(jax.lax.stop_gradient(highest), axes)
    scattered = functools.partial(jax.lax.psum_scatter, axis_name=axes, tiled=True)
    if contrast == "sigmoid":
        cost = scattered(cost)
    else:  # the largest logit of a column is the same on every device
        cost = scattered(jnp.exp(cost - highest))
    nearest = jax.lax.dynamic_slice_in_dim(highest, jax.lax.axis_index(axes) * len(cost), len(cost))
    return Negatives(cost if contrast == "sigmoid" else jnp.log(cost) + nearest, nearest)
