"""Rotary positions of image patches: angles of row and column turn queries and keys (Heo et al. 2024).

The angles are DINOv3's (Siméoni et al. 2025): 2 pi times the centre of the patch, in [-1, 1] along each side;
row first; channel i of a head turns with channel i + half. They are the same at every resolution. Each axis
has half of a head's frequencies, theta ** -(i / (head_dim / 4)). Leading tokens are not turned.

PE-core's angles (Bolya et al. 2025) are row and column, from 1, times trained grid / grid. Its channels are
in another order, which the conversion changes (convert/open_clip.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
    """Cosine and sine of the angle of every token and channel, float32 [N or B N, 1, head_dim]."""

    cos: jax.Array
    sin: jax.Array


def of_grid(
    grid: int,
    *,
    theta: float,
    head_dim: int,
    leading: int,
    kept: jax.Array | None = None,
    trailing: int = 0,
    trained_grid: int = 0,
) -> Rotation:
    """The rotation of `leading` tokens, `grid` x `grid` patches, row by row, and `trailing` tokens.

    Args:
      grid: patches per side.
      theta: longest wave / shortest wave.
      head_dim: channels of a head.
      leading: tokens before the patches.
      kept: int32 [B, n], the numbers of the patches that are there; None: all.
      trailing: tokens after the patches.
      trained_grid: of PE-core's angles; 0: DINOv3's.
    """
    places = (np.arange(grid) + 1) * trained_grid / grid
    if not trained_grid:
        places = 2 * np.pi * (2 * (np.arange(grid) + 0.5) / grid - 1)
    waves = theta ** -(np.arange(head_dim // 4) / (head_dim // 4))
    y, x = (axis.reshape(-1, 1) for axis in np.meshgrid(places, places, indexing="ij"))
    angles = np.tile(np.concatenate([y * waves, x * waves], axis=-1), 2)
    angles = np.pad(angles, ((leading, 0), (0, 0)))[:, None]  # [N, 1, head_dim]
    tables = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    if kept is not None:
        # Token 0 stands for all leading ones.
        number = jnp.pad(kept + leading, ((0, 0), (leading, 0)))
        tables = (table[number] for table in tables)
    after = (0, trailing), (0, 0), (0, 0)
    return Rotation(*(jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [*after]) for x in tables))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Queries or keys [B, N, K, head_dim], turned in float32, returned in the dtype of the input."""
    y = x.astype(jnp.float32)
    first, second = jnp.split(y, 2, axis=-1)
    other = jnp.concatenate([-second, first], axis=-1)
    return (y * rotation.cos + other * rotation.sin).astype(x.dtype)
