"""Rotary positions of image patches: queries and keys are turned by angles of row and column (Heo et al. 2024).

Those of DINOv3 (Siméoni et al. 2025): 2 pi times the centre of the patch, in [-1, 1] along each side; row first;
channel i of a head turns with channel i + half. The same at every resolution, so nothing is resized. Half of the
frequencies of a head are of each axis: theta ** -(i / (head_dim / 4)). Leading tokens are not turned.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.config import ImageTower


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of the tokens of an image."""

    theta: float  # longest wave / shortest wave
    grid: int  # patches a side
    leading: int  # tokens before the patches

    def rotate(self, x: jax.Array, kept: jax.Array | None = None) -> jax.Array:
        """Queries or keys [B, N, K, head_dim], turned; computed in float32, returned in the dtype of the input.

        `kept` are the numbers of the patches that are there, int32 [B, n]; None: all.
        """
        cos, sin = _tables(self, x.shape[-1])
        if kept is not None:
            number = jnp.pad(
                kept + self.leading, ((0, 0), (self.leading, 0))
            )  # token 0 for leading ones
            cos, sin = (jnp.asarray(table)[number] for table in (cos, sin))
        cos, sin = (table[..., None, :] for table in (cos, sin))  # [N or B N, 1, head_dim]
        y = x.astype(jnp.float32)
        first, second = jnp.split(y, 2, axis=-1)
        other = jnp.concatenate([-second, first], axis=-1)
        return (y * cos + other * sin).astype(x.dtype)


def of_tower(tower: ImageTower, leading: int, grid: int) -> Rope | None:
    """The rotary positions of a tower with so many leading tokens, for `grid` x `grid` patches; None: it has none."""
    return Rope(tower.rope_theta, grid, leading) if tower.rope == "centres" else None


@functools.lru_cache(maxsize=8)
def _tables(rope: Rope, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every token and channel, float32 [N, head_dim]; 1 and 0 of leading tokens."""
    places = 2 * np.pi * (2 * (np.arange(rope.grid) + 0.5) / rope.grid - 1)
    waves = rope.theta ** -(np.arange(head_dim // 4) / (head_dim // 4))
    y, x = (axis.reshape(-1, 1) for axis in np.meshgrid(places, places, indexing="ij"))
    angles = np.concatenate([y * waves, x * waves], axis=-1)
    angles = np.concatenate([angles, angles], axis=-1)
    angles = np.pad(angles, ((rope.leading, 0), (0, 0)))  # [N, head_dim]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
