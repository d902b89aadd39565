"""Rotary positions of image patches: queries and keys are turned by angles of row and column (Heo et al. 2024).

`centres`  DINOv3 (Siméoni et al. 2025): 2 pi times the centre of the patch, in [-1, 1] along each side; row first; channel
           i of a head turns with channel i + half. The same at every resolution, so nothing is resized.
`grid`     PE-core (Bolya et al. 2025): column and row of the patch, from 1; channel 2 i turns with channel 2 i + 1.
           Those of another grid than that of pretraining are scaled to its size. (Size G counts from 0, the same
           without a class token: patches see differences alone.)

Half of the frequencies of a head are of each axis: theta ** -(i / (head_dim / 4)). Leading tokens are not turned.
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

    kind: str  # "centres" or "grid"
    theta: float  # longest wave / shortest wave
    trained_grid: int  # patches a side of pretraining; of "grid"
    grid: int  # patches a side
    leading: int  # tokens before the patches

    def rotate(self, x: jax.Array) -> jax.Array:
        """Queries or keys [B, N, K, head_dim], turned; computed in float32, returned in the dtype of the input."""
        cos, sin = (table[:, None] for table in _tables(self, x.shape[-1]))  # [N, 1, head_dim]
        y = x.astype(jnp.float32)
        if self.kind == "centres":
            first, second = jnp.split(y, 2, axis=-1)
            other = jnp.concatenate([-second, first], axis=-1)
        else:
            other = jnp.stack([-y[..., 1::2], y[..., ::2]], axis=-1).reshape(y.shape)
        return (y * cos + other * sin).astype(x.dtype)


def of_tower(tower: ImageTower, leading: int, grid: int) -> Rope | None:
    """The rotary positions of a tower with so many leading tokens, for `grid` x `grid` patches; None: it has none."""
    if tower.rope == "none":
        return None
    return Rope(tower.rope, tower.rope_theta, tower.rope_grid, grid, leading)


@functools.lru_cache(maxsize=8)
def _tables(rope: Rope, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every token and channel, float32 [N, head_dim]; 1 and 0 of leading tokens."""
    waves = rope.theta ** -(np.arange(head_dim // 4) / (head_dim // 4))
    at = np.arange(rope.grid)
    if rope.kind == "centres":
        places = 2 * np.pi * (2 * (at + 0.5) / rope.grid - 1)
        y, x = np.meshgrid(places, places, indexing="ij")
        axes = (y, x)
    else:
        places = (at + 1) * (rope.trained_grid / rope.grid)
        y, x = np.meshgrid(places, places, indexing="ij")
        axes = (x, y)
    angles = np.concatenate([axis.reshape(-1, 1) * waves for axis in axes], axis=1)
    angles = np.tile(angles, 2) if rope.kind == "centres" else np.repeat(angles, 2, axis=1)
    angles = np.pad(angles, ((rope.leading, 0), (0, 0)))  # [N, head_dim]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
