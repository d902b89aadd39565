"""Cross-entropy of tokens over a vocabulary, in memory that does not grow with its size times the tokens.

The rows of the table are taken `tile` at a time. Running sums over the tiles give the loss of each token, as in
FlashAttention (Dao et al. 2022); the backward pass computes the logits of a tile again (a custom VJP), writes the
gradient of its rows once, and adds to that of the features. Kept between the passes: features, table, targets and two
numbers a token.

On a mesh each device has the tokens of its part of the batch and, where there is an axis `tensor`, its part of the rows.
It holds one or two arrays of [its tokens, `tile`] float32. A forward pass has a maximum and a sum of a few numbers a
token over `tensor`, a backward pass one sum of the gradient of the features over `tensor`, and of that of the table over
the axes of the batch. A table whose width is cut over `fsdp` is gathered in the dtype of the features, and its gradient
is scattered back.

With bfloat16 features these are rounded to bfloat16: the table in its products, and the derivative of the loss by each
logit in the products of the backward pass; and the gradient of the table, summed over the devices of the batch.
Logits, exponentials and all other sums are float32.
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from grain_jax.losses import streaming
from grain_jax.losses.streaming import MASKED

# The mesh axes that cut the table, as `config.sharding` does by default.
ROWS, WIDTH = "tensor", "fsdp"
LANES = 128  # a tile is a multiple, if `tile` is one
NONE = np.iinfo(np.int32).min  # no target


class CrossEntropy(NamedTuple):
    """Of each token; a gradient goes through `loss` alone."""

    loss: Float[Array, "*n"]
    highest: Float[Array, "*n"]  # the largest logit
    # The logit of the target: the same number as `highest` where that is the largest.
    own: Float[Array, "*n"]


def cross_entropy(
    features: Float[Array, "*n E"],
    table: Float[Array, "V E"],
    targets: Int[Array, "*n"],
    *,
    tile: int = 4096,
    smoothing: float = 0.0,
    size: int | None = None,
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = (),
) -> CrossEntropy:
    """-log softmax(features . table)[target] of each token, with label smoothing (Szegedy et al. 2016, section 7).

    With p = softmax and eps = `smoothing`: (1 - eps) * -log p[target] + eps * mean over the vocabulary of -log p.

    Args:
      features: float32 or bfloat16. On a mesh the leading axis is cut over `batch_axes`, and the tokens divide by them.
      table: float32, a row for each token of the vocabulary. Where it does not lie as `ROWS` and `WIDTH` say it is moved.
      targets: in [0, size); with another one `own` is 0 and the loss means nothing, but is finite.
      tile: largest number of rows whose logits are in memory at once.
      smoothing: in [0, 1).
      size: of the vocabulary: rows from there on are padding, and no tokens; None: all rows are tokens.
      mesh: of the program that this is in; None: one device.
      batch_axes: the axes of the mesh that cut the batch; `ROWS` is none of them.

    Returns:
      float32 arrays like `targets`.
    """
    given = _Given(tile, smoothing, len(table) if size is None else size, mesh, batch_axes)
    if WIDTH in batch_axes and table.shape[1] % given.devices(WIDTH) == 0:
        given = given._replace(width=WIDTH)
    flat = features.reshape(-1, features.shape[-1])
    found = cast(CrossEntropy, _cross_entropy(given, flat, table, targets.reshape(-1)))
    return CrossEntropy(*(x.reshape(targets.shape) for x in found))


class _Given(NamedTuple):
    """What is known when the program is traced."""

    tile: int
    smoothing: float
    size: int
    mesh: Mesh | None
    batch_axes: tuple[str, ...]
    # The axis that cuts the width of the table; its devices have different tokens.
    width: str | None = None

    def devices(self, axis: str | None) -> int:
        """How many there are along an axis of the mesh."""
        return 1 if self.mesh is None or axis is None else self.mesh.shape.get(axis, 1)

    @property
    def of_tokens(self) -> PartitionSpec:
        """How arrays of tokens are cut."""
        return PartitionSpec(self.batch_axes)

    @property
    def like_table(self) -> PartitionSpec:
        """How the table and its gradient are cut."""
        return PartitionSpec(ROWS if self.devices(ROWS) > 1 else None, self.width)

    def on_mesh(self, function, takes: tuple[PartitionSpec, ...], gives: Any):
        """The function of these settings and of arrays, on each device."""
        run = functools.partial(function, self)
        if self.mesh is None:
            return run
        return jax.shard_map(run, mesh=self.mesh, in_specs=takes, out_specs=gives, check_vma=False)

    def padded(self, table: Array) -> Array:
        """The table with rows of zeros, so that it divides over `ROWS`."""
        rest = -len(table) % self.devices(ROWS)
        return jnp.pad(table, ((0, rest), (0, 0))) if rest else table


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(given: _Given, features: Array, table: Array, targets: Array) -> CrossEntropy:
    return _forward(given, features, table, targets)[0]


def _forward(given, features, table, targets):
    tokens, rows = given.of_tokens, given.like_table
    run = given.on_mesh(_forward_here, (tokens, rows, tokens), tokens)
    found, total = run(features, given.padded(table), targets)
    return found, (features, table, targets, found.highest, total)


def _backward(given, residuals, cotangents):
    features, table, *numbers = residuals
    tokens, rows = given.of_tokens, given.like_table
    run = given.on_mesh(_backward_here, (tokens, rows, *[tokens] * 4), (tokens, rows))
    of_features, of_table = run(features, given.padded(table), *numbers, cotangents.loss)
    return of_features, of_table[: len(table)], None


_cross_entropy.defvjp(_forward, _backward)


def _forward_here(given: _Given, features, table, targets):
    """(CrossEntropy of the tokens of this device, the sums of their exp(logit - highest))."""
    tiles = _Tiles.of(given, features, table)

    def one_tile(sums, number):
        highest, total, own, everything = sums
        rows = tiles.rows(number)
        logits = jnp.where(rows.real, tiles.product("nd,vd->nv", features, rows.vectors), MASKED)
        higher = jnp.maximum(highest, logits.max(1))
        total = total * jnp.exp(highest - higher) + jnp.exp(logits - higher[:, None]).sum(1)
        own += jnp.where(rows.token == targets[:, None], logits, 0).sum(1)
        if given.smoothing:
            everything += jnp.where(rows.real, logits, 0).sum(1)
        return (higher, total, own, everything), None

    zeros = jnp.zeros(len(features))
    nothing = jnp.full(len(features), MASKED), zeros, zeros, zeros
    (highest, total, own, everything), _ = jax.lax.scan(one_tile, nothing, tiles.numbers)
    if given.devices(ROWS) > 1:
        here, highest = highest, jax.lax.pmax(highest, ROWS)
        sums = total * jnp.exp(here - highest), own, everything
        total, own, everything = jax.lax.psum(sums, ROWS)
    # Differences of logits first: they may be large.
    loss = jnp.log(total) + (1 - given.smoothing) * (highest - own)
    if given.smoothing:
        loss += given.smoothing * (highest - everything / given.size)
    return CrossEntropy(loss, highest, own), total


def _backward_here(given: _Given, features, table, targets, highest, total, cotangent):
    """The gradients of the features of this device's tokens, and of its part of the table."""
    tiles = _Tiles.of(given, features, table)
    of_logits = (cotangent / total)[:, None]
    of_target = ((1 - given.smoothing) * cotangent)[:, None]
    of_all = (given.smoothing / given.size * cotangent)[:, None]

    def one_tile(gradients, number):
        of_features, of_table = gradients
        rows = tiles.rows(number)
        logits = tiles.product("nd,vd->nv", features, rows.vectors)
        share = of_logits * jnp.exp(logits - highest[:, None])
        share -= jnp.where(rows.token == targets[:, None], of_target, 0) + of_all
        share = jnp.where(rows.real, share, 0).astype(features.dtype)
        of_features += tiles.product("nv,vd->nd", share, rows.vectors)
        of_rows = tiles.product("nv,nd->vd", share, features)
        of_table = jax.lax.dynamic_update_slice_in_dim(of_table, of_rows, rows.start, 0)
        return (of_features, of_table), None

    # The last tile first: what it has of rows of the tile before it is written over.
    zeros = jnp.zeros(features.shape), jnp.zeros((len(table), features.shape[1]))
    (of_features, of_table), _ = jax.lax.scan(one_tile, zeros, tiles.numbers, reverse=True)
    if given.devices(ROWS) > 1:
        of_features = jax.lax.psum(of_features, ROWS)
    if given.devices(given.width) > 1:
        of_table = jax.lax.psum_scatter(of_table, given.width, scatter_dimension=1, tiled=True)
    if rest := tuple(x for x in given.batch_axes if x != given.width and given.devices(x) > 1):
        of_table = jax.lax.psum(of_table.astype(features.dtype), rest).astype(of_table.dtype)
    return of_features.astype(features.dtype), of_table


class _Rows(NamedTuple):
    """A tile: rows of the table of this device."""

    start: Array  # int32 [], place of the first one
    vectors: Array  # [v, E], in the dtype of the features
    real: Array  # bool [v], False: padding, or in the tile before
    token: Array  # int32 [v], its number in the vocabulary; NONE where it is not real


class _Tiles(NamedTuple):
    """The table of this device in equal tiles, without a copy: the last one may begin in the one before it."""

    table: Array  # [rows, E]
    first: Any  # int32 [], token of its first row
    vocabulary: int
    size: int  # rows of a tile
    dtype: Any  # of products

    @classmethod
    def of(cls, given: _Given, features: Array, table: Array) -> "_Tiles":
        first = jax.lax.axis_index(ROWS) * len(table) if given.devices(ROWS) > 1 else 0
        if given.devices(given.width) > 1:
            rounded = table.astype(features.dtype)
            table = jax.lax.all_gather(rounded, given.width, axis=1, tiled=True)
        unit = math.gcd(given.tile, LANES)
        share = len(table) / math.ceil(len(table) / given.tile)
        size = min(len(table), math.ceil(share / unit) * unit)
        return cls(table, first, given.size, size, features.dtype)

    @property
    def numbers(self) -> Array:
        """Those of the tiles, int32."""
        return jnp.arange(math.ceil(len(self.table) / self.size))

    def rows(self, number: Array) -> _Rows:
        """The tile of this number."""
        start = jnp.minimum(number * self.size, len(self.table) - self.size)
        place = start + jnp.arange(self.size)
        vectors = jax.lax.dynamic_slice_in_dim(self.table, start, self.size).astype(self.dtype)
        token = self.first + place
        real = (place >= number * self.size) & (token < self.vocabulary)
        return _Rows(start, vectors, real, jnp.where(real, token, NONE))

    def product(self, equation: str, a: Array, b: Array) -> Array:
        """float32, of operands in the dtype of the features."""
        exact = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        return streaming.product(equation, a, b, exact)
