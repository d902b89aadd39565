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
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.config import ImageTower
from grain_jax.models.places import Places

Turns: TypeAlias = tuple[Any, Any]  # cosine and sine of every token and channel


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of the tokens of an image."""

    kind: str  # "centres" or "grid"
    theta: float  # longest wave / shortest wave
    trained_grid: int  # patches a side of pretraining; of "grid"
    grid: int  # patches a side
    leading: int  # tokens before the patches

    def rotate(self, x: jax.Array, turns: Turns | None = None) -> jax.Array:
        """Queries or keys [B, N, K, head_dim], turned; computed in float32, returned in the dtype of the input.

        `turns` are those of `self.turns`; None: of the square of `grid` patches a side.
        """
        if turns is None:
            turns = _tables(self, x.shape[-1])
        cos, sin = (
            table[..., None, :] for table in turns
        )  # [N, 1, head_dim] or [B, N, 1, head_dim]
        y = x.astype(jnp.float32)
        if self.kind == "centres":
            first, second = jnp.split(y, 2, axis=-1)
            other = jnp.concatenate([-second, first], axis=-1)
        else:
            other = jnp.stack([-y[..., 1::2], y[..., ::2]], axis=-1).reshape(y.shape)
        return (y * cos + other * sin).astype(x.dtype)

    def turns(self, places: Places, head_dim: int) -> Turns:
        """Cosine and sine of every token at these places, float32 [B, N, head_dim]; `centres` by the image's own sides."""
        sides = jnp.maximum(places.grid, 1)[:, None].astype(jnp.float32)
        if self.kind == "centres":
            at = 2 * np.pi * (2 * (places.yx + 0.5) / sides - 1)
        else:
            at = (places.yx + 1) * (self.trained_grid / sides)
        angles = _angles(self, (at[..., :1], at[..., 1:]), head_dim, jnp)
        angles = jnp.pad(angles, ((0, 0), (self.leading, 0), (0, 0)))
        return jnp.cos(angles), jnp.sin(angles)


def of_tower(tower: ImageTower, leading: int, grid: int = 0) -> Rope | None:
    """The rotary positions of a tower with so many leading tokens, for `grid` x `grid` patches; None: it has none.

    Without a grid they are those of places (`Rope.turns`).
    """
    if tower.rope == "none":
        return None
    return Rope(tower.rope, tower.rope_theta, tower.rope_grid, grid, leading)


@functools.lru_cache(maxsize=8)
def _tables(rope: Rope, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every token and channel, float32 [N, head_dim]; 1 and 0 of leading tokens."""
    at = np.arange(rope.grid)
    if rope.kind == "centres":
        places = 2 * np.pi * (2 * (at + 0.5) / rope.grid - 1)
    else:
        places = (at + 1) * (rope.trained_grid / rope.grid)
    y, x = (axis.reshape(-1, 1) for axis in np.meshgrid(places, places, indexing="ij"))
    angles = _angles(rope, (y, x), head_dim, np)
    angles = np.pad(angles, ((rope.leading, 0), (0, 0)))  # [N, head_dim]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _angles(rope: Rope, yx: tuple[Any, Any], head_dim: int, library: Any) -> Any:
    """Angles of places [..., 1] each: [..., head_dim]; `library` is numpy or jax.numpy."""
    waves = rope.theta ** -(np.arange(head_dim // 4) / (head_dim // 4))
    axes = yx if rope.kind == "centres" else yx[::-1]
    angles = library.concatenate([axis * waves for axis in axes], axis=-1)
    if rope.kind == "centres":
        return library.concatenate([angles, angles], axis=-1)
    return library.repeat(angles, 2, axis=-1)
