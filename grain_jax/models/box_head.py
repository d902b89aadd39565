"""Embeddings of given boxes: what is in a box that somebody drew, annotated or detected.

`RoIAlign` averages the final image tokens in the box. No box sees another, so that a
box has one embedding whatever else is asked for. docs/method.md, Model.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.config import BoxHead, ImageTower
from grain_jax.core import errors


def roi_align(features: jax.Array, boxes_xyxy: jax.Array, *, bins: int, samples: int) -> jax.Array:
    """RoIAlign (He et al. 2017): the mean of bilinear samples in each of `bins` x `bins` parts of each box.

    Equal to torchvision.ops.roi_align with `aligned=True` and `sampling_ratio=samples`. The centre of cell i
    is at (i + 1/2) / cells. A sample more than half a cell outside the image counts as 0, a nearer one as the
    edge. A bilinear sample on a grid is a product of two hat functions, so the whole is two matrix products.

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
    down = _bin_weights(y1, y2, rows, bins, samples)
    across = _bin_weights(x1, x2, columns, bins, samples)
    lines = product("brih,bhwe->briwe", down, features.astype(jnp.float32))
    return product("brjw,briwe->brije", across, lines)


def _bin_weights(start, end, cells: int, bins: int, samples: int):
    """The share of each cell of a side in every bin of the sections from `start` to `end`.

    Args:
      start, end: [B, R], as shares of the side.
      cells: of the side.
      bins: of a section.
      samples: of a bin.

    Returns:
      float32 [B, R, bins, cells].
    """
    offsets = (np.arange(bins * samples) + 0.5) / (bins * samples)
    points = start[..., None] + (end - start)[..., None] * offsets
    points = points * cells - 0.5  # 0 is the centre of the first cell
    inside = (points >= -1) & (points <= cells)
    points = jnp.clip(points, 0, cells - 1)
    hats = jnp.maximum(0, 1 - jnp.abs(points[..., None] - np.arange(cells)))
    hats = jnp.where(inside[..., None], hats, 0)
    return hats.reshape(*hats.shape[:-2], bins, samples, cells).mean(-2)


def of_kept(
    patches: jax.Array, kept: jax.Array, boxes_xyxy: jax.Array, *, grid: int, bins: int, samples: int
) -> jax.Array:
    """`roi_align` of the kept patches [B, n, E] by their numbers, int32 [B, n], in a square of `grid` a side.

    The kept patches have the weight of all in a bin; a bin without any of them is 0.
    """
    is_at = kept[:, None] == np.arange(grid**2)[:, None]  # [B, P, n]
    x = jnp.concatenate([patches.astype(jnp.float32), jnp.ones((*kept.shape, 1))], axis=-1)
    precision = jax.lax.Precision.HIGHEST
    x = jnp.einsum("bpn,bne->bpe", is_at.astype(jnp.float32), x, precision=precision)
    x = x.reshape(x.shape[0], grid, grid, x.shape[-1])
    sizes = dict(bins=bins, samples=samples)
    means = roi_align(x, boxes_xyxy, **sizes)
    means, share = means[..., :-1], means[..., -1:]
    of_all = roi_align(jnp.ones((*x.shape[:3], 1)), boxes_xyxy, **sizes)
    return jnp.where(share > 0, means * of_all / jnp.where(share > 0, share, 1), 0)


def token_boxes(tokens: int, leading: int) -> np.ndarray:
    """The box of each token, float32 xyxy [N, 4]: its patch, or the whole image for the `leading` ones."""
    grid = grid_size(tokens, leading)
    y, x = np.divmod(np.arange(grid * grid), grid)
    patches = np.stack([x, y, x + 1, y + 1], axis=1) / grid
    whole = np.tile([0.0, 0.0, 1.0, 1.0], (leading, 1))
    return np.concatenate([whole, patches]).astype(np.float32)


def patch_centres(grid: int) -> np.ndarray:
    """The centre (x, y) of each patch of a square of `grid` a side, row by row, float32 [P, 2] in [0, 1]."""
    y, x = np.divmod(np.arange(grid * grid), grid)
    return ((np.stack([x, y], axis=1) + 0.5) / grid).astype(np.float32)


def grid_size(tokens: int, leading: int) -> int:
    """Patches along a side. Raises UserError: the tokens after the leading ones make no square."""
    grid = round((tokens - leading) ** 0.5)
    if grid * grid != tokens - leading or not grid:
        raise errors.UserError(
            f"model.image.tower: got {tokens} tokens, {leading} of them leading, expected a square number of"
            " patches after these, as boxes and maps need it"
        )
    return grid


class RoIAlign(nn.Module):
    """The tokens in the box, averaged in each bin."""

    head: BoxHead
    image: ImageTower
    dtype: np.dtype

    @nn.compact
    def __call__(
        self, tokens: jax.Array, boxes_xyxy: jax.Array, leading: int, kept: jax.Array | None = None
    ) -> jax.Array:
        """The means of the parts of each box.

        Args:
          tokens: [B, N, E], `leading` of them without a place.
          boxes_xyxy: [B, R, 4].
          leading: tokens before the patches.
          kept: int32 [B, n], the numbers of the patches that are there; None: all.

        Returns:
          [B, R, bins * bins * E].
        """
        sizes = dict(bins=self.head.bins, samples=self.head.samples)
        patches = tokens[:, leading:]
        if kept is not None:
            grid = self.image.image_size // self.image.patch_size
            means = of_kept(patches, kept, boxes_xyxy, grid=grid, **sizes)
        else:
            batch, count, width = patches.shape
            grid = grid_size(count, 0)
            means = roi_align(patches.reshape(batch, grid, grid, width), boxes_xyxy, **sizes)
        means = means.astype(self.dtype)
        return means.reshape(*means.shape[:2], self.head.bins**2 * tokens.shape[2])
