"""Embeddings of given boxes: what is in a box that somebody drew, annotated or detected.

`RoIAlign` averages the final image tokens in the box; `Prompter` lets the box attend to all tokens. Neither compares
boxes with each other, so a box has the same embedding whatever else is asked for. docs/method.md, Model.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.config import BoxHead, ImageTower
from grain_jax.core import errors
from grain_jax.core.schema import Array
from grain_jax.models import layers, placement
from grain_jax.models import places as places_lib
from grain_jax.models.places import Places

_OCTAVES = 6  # of the box coordinates in `fourier`: waves of 1, 1/2 ... 1/32 of the image
PLACE = 2 * 4 * _OCTAVES  # numbers that say where a box is


def roi_align(features: jax.Array, boxes_xyxy: jax.Array, *, bins: int, samples: int) -> jax.Array:
    """RoIAlign (He et al. 2017): the mean of bilinear samples in each of `bins` x `bins` parts of each box.

    Equal to torchvision.ops.roi_align with `aligned=True` and `sampling_ratio=samples`: the centre of cell i is at
    (i + 1/2) / cells; a sample farther than half a cell outside of the image counts as 0, one less far as the edge.
    A bilinear sample on a grid is a product of two hat functions, so the whole is two matrix products.

    Args:
      features: [B, h, w, E].
      boxes_xyxy: float32 [B, R, 4], corners in [0, 1] of the image; they may lie outside of it.
      bins: parts of a box along each side.
      samples: points of a part along each side.

    Returns:
      float32 [B, R, bins, bins, E].
    """
    _, rows, columns, _ = features.shape
    product = lambda equation, a, b: jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)
    x1, y1, x2, y2 = jnp.moveaxis(boxes_xyxy.astype(jnp.float32), -1, 0)
    down = _bin_weights(y1, y2, rows, np.arange(rows), bins, samples)
    across = _bin_weights(x1, x2, columns, np.arange(columns), bins, samples)
    lines = product("brih,bhwe->briwe", down, features.astype(jnp.float32))
    return product("brjw,briwe->brije", across, lines)


def roi_align_at(
    patches: jax.Array, places: Places, boxes_xyxy: jax.Array, *, bins: int, samples: int
) -> jax.Array:
    """`roi_align` of patches [B, P, E] at these places: that of the map of each image, whatever its sides.

    The weight of a patch in a bin is the product of those of its row and of its column. Of an image that lacks some of
    its patches, those that are there have the weight of all in the bin; a bin without any of them is 0.
    """
    x1, y1, x2, y2 = jnp.moveaxis(boxes_xyxy.astype(jnp.float32), -1, 0)
    cells = lambda axis: places.grid[:, axis, None, None]
    of_axis = lambda start, end, axis: _bin_weights(
        start, end, cells(axis), places.yx[:, None, None, :, axis], bins, samples
    )
    outer = lambda down, across: down[:, :, :, None] * across[:, :, None]
    weights = outer(of_axis(y1, y2, 0), of_axis(x1, x2, 1))
    weights = jnp.where(places.mask[:, None, None, None], weights, 0)  # [B, R, bins, bins, P]
    # All patches together have the share of the samples that lies inside of the image.
    inside = lambda start, end, axis: (
        _points(start, end, cells(axis), bins * samples)[1]
        .reshape(*start.shape, bins, samples)
        .mean(-1)
    )
    of_all = outer(inside(y1, y2, 0), inside(x1, x2, 1))[..., None]
    total = weights.sum(-1, keepdims=True)
    is_whole = places.mask.sum(1) == places.grid.prod(1)
    as_it_is = is_whole.reshape(-1, 1, 1, 1, 1) | (total <= 0)
    divisor = jnp.where(as_it_is, 1, total / jnp.where(of_all > 0, of_all, 1))
    precision = jax.lax.Precision.HIGHEST
    patches = jnp.where(places.mask[..., None], patches.astype(jnp.float32), 0)
    return jnp.einsum("brijp,bpe->brije", weights / divisor, patches, precision=precision)


def of_patches(
    patches: jax.Array, boxes_xyxy: jax.Array, places: Places | None, *, bins: int, samples: int
) -> jax.Array:
    """RoIAlign of patch tokens [B, P, E] at their places, None a full square: float32 [B, R, bins, bins, E]."""
    if places is not None:
        return roi_align_at(patches, places, boxes_xyxy, bins=bins, samples=samples)
    batch, count, width = patches.shape
    grid = grid_size(count, 0)
    features = patches.reshape(batch, grid, grid, width)
    return roi_align(features, boxes_xyxy, bins=bins, samples=samples)


def _bin_weights(start, end, cells, at, bins: int, samples: int):
    """The share of cells in every bin of the sections from `start` to `end`.

    Args:
      start, end: [B, R], as shares of the side.
      cells: of the side; a number, or int32 [B, 1, 1].
      at: the numbers of n cells, int32 [n], or [B, 1, 1, n].
      bins: of a section.
      samples: of a bin.

    Returns:
      float32 [B, R, bins, n].
    """
    points, inside = _points(start, end, cells, bins * samples)
    points = jnp.clip(points, 0, cells - 1)
    hats = jnp.maximum(0, 1 - jnp.abs(points[..., None] - at))
    hats = jnp.where(inside[..., None], hats, 0)
    return hats.reshape(*hats.shape[:-2], bins, samples, hats.shape[-1]).mean(-2)


def _points(start, end, cells, count: int):
    """So many samples of the sections, 0 the centre of the first cell, and which lie inside: [B, R, count] each."""
    places = (np.arange(count) + 0.5) / count
    points = start[..., None] + (end - start)[..., None] * places
    points = points * cells - 0.5
    return points, (points >= -1) & (points <= cells)


def token_boxes(tokens: int, leading: int, places: Places | None = None) -> Array:
    """The box of each of so many tokens, float32 xyxy [N, 4]: that of its patch; of the `leading` ones the image.

    With places [B, N, 4].
    """
    if places is not None:
        own = places_lib.boxes(places)
        whole = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0]), (len(own), leading, 4))
        return jnp.concatenate([whole, own], axis=1)
    grid = grid_size(tokens, leading)
    y, x = np.divmod(np.arange(grid * grid), grid)
    patches = np.stack([x, y, x + 1, y + 1], axis=1) / grid
    whole = np.tile([0.0, 0.0, 1.0, 1.0], (leading, 1))
    return np.concatenate([whole, patches]).astype(np.float32)


def grid_size(tokens: int, leading: int) -> int:
    """Patches along a side. Raises UserError: the tokens after the leading ones make no square."""
    grid = round((tokens - leading) ** 0.5)
    if grid * grid != tokens - leading or not grid:
        raise errors.UserError(
            f"model.image.tower: got {tokens} tokens, {leading} of them leading, expected a square number of patches after"
            " these, as boxes and maps need it"
        )
    return grid


def fourier(boxes_xyxy: jax.Array) -> jax.Array:
    """Sine and cosine of the corners, xyxy [..., 4] in [0, 1] -> float32 [..., PLACE]."""
    angles = boxes_xyxy[..., None] * (2 * np.pi * 2.0 ** np.arange(_OCTAVES))
    angles = angles.reshape(*boxes_xyxy.shape[:-1], PLACE // 2)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class RoIAlign(nn.Module):
    """The tokens in the box, averaged in each bin."""

    head: BoxHead
    dtype: np.dtype

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        boxes_xyxy: jax.Array,
        leading: int,
        places: Places | None = None,
    ) -> jax.Array:
        """tokens [B, N, E], `leading` of them without a place, and boxes [B, R, 4] -> [B, R, bins * bins * E]."""
        sizes = dict(bins=self.head.bins, samples=self.head.samples)
        found = of_patches(tokens[:, leading:], boxes_xyxy, places, **sizes).astype(self.dtype)
        return found.reshape(*found.shape[:2], self.head.bins**2 * tokens.shape[2])


class Prompter(nn.Module):
    """A box attends to the tokens: one layer of cross-attention and MLP, its place and theirs in Fourier features.

    The form is CLOC's (Chen et al. 2025, arXiv 2410.02746): a small module between the image tokens and any number of
    boxes. There it is a layer of self-attention over a box and all tokens; here each box only asks the tokens, so that
    many boxes cost little.
    """

    tower: ImageTower  # its width, heads, MLP, activation and norm are those of the layer
    dtype: np.dtype

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        boxes_xyxy: jax.Array,
        leading: int,
        places: Places | None = None,
    ) -> jax.Array:
        """tokens [B, N, E], `leading` of them without a place, and boxes [B, R, 4] -> [B, R, width]."""
        t = self.tower
        xavier = nn.initializers.xavier_uniform()
        norm = lambda name: layers.LayerNorm(t.norm_eps, name=name)
        to_width = lambda name, kind: layers.dense(
            t.width, (kind,), ("vector",), dtype=self.dtype, kernel_init=xavier, name=name
        )
        place = to_width("place", "vector")
        memory = norm("memory_norm")(to_width("memory_projection", "width")(tokens))
        of_tokens = place(fourier(jnp.asarray(token_boxes(tokens.shape[1], leading, places))))
        x = place(fourier(boxes_xyxy.astype(jnp.float32)))
        attention = layers.Attention(
            t.width, t.heads, self.dtype, kernel_init=xavier, out_init=xavier, name="attention"
        )
        sees = places_lib.keys(places, tokens.shape[1])
        x = x + attention(norm("norm_1")(x), memory + of_tokens, memory, sees)
        mlp = layers.MLP(
            t.width,
            t.mlp_dim,
            t.activation,
            self.dtype,
            in_init=xavier,
            out_init=xavier,
            name="mlp",
        )
        x = placement.by_batch(x + mlp(norm("norm_2")(x)))
        return norm("norm")(x)
