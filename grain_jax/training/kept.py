"""Which patches of the images the tower sees in a step, where `model.image.keep` is below 1 (docs/method.md).

FLIP (Li et al. 2023, arXiv 2212.00794) draws them at random; CLIPA (Li et al. 2023, arXiv 2305.07017) also by cells of
the grid. What is drawn is a function of the key of the image, so micro-batches, meshes and resumes agree.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.config import keep as keep_lib
from grain_jax.core import schema
from grain_jax.models import placement
from grain_jax.models import places as places_lib


def count(keep: float, patches: int) -> int:
    """How many of so many patches are kept: the nearest whole number to that share, and at least one."""
    return max(1, math.floor(keep * patches + 0.5))


def cell(keep: float) -> int:
    """Patches along the side of a cell of keep_by=grid: one of it is kept, or with a keep above 1/4 more of 2 x 2."""
    return max(2, math.floor(keep**-0.5 + 1e-9))


def draw(
    keys: jax.Array, image: jax.Array | schema.Patches, tower: config_lib.ImageTower
) -> jax.Array:
    """The kept patches of images, by their numbers row by row, in this order.

    Args:
      keys: PRNG keys [B] of the images.
      image: [B, S, S, 3], or Patches of N.
      tower: `model.image`; of several shares the largest counts.

    Returns:
      int32 [B, n], n the kept ones of the most patches that an image may have. An image of fewer patches keeps the same
      share of them; a number that is left is that of padding.
    """
    keep = keep_lib.most(tower.keep)
    if isinstance(image, schema.Patches):
        places = places_lib.of_grid(image.grid, image.pixels.shape[1])
    else:
        places = places_lib.of_square(image.shape[0], image.shape[1] // tower.patch_size)
    patches = places.mask.shape[1]
    drawn = lambda keys: jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys)
    order = drawn(keys)
    if tower.keep_by == "grid":
        rank, size = _in_cells(places, order, cell(keep))
        # A whole cell gives one after another; of one that an odd side cuts, a patch is as likely as of any.
        order = (rank + drawn(jax.vmap(jax.random.fold_in, (0, None))(keys, 1))) / size
    # Not top_k, for which XLA would gather the patches of all devices.
    found = jnp.argsort(jnp.where(places.mask, order, jnp.inf), axis=1)
    most = count(keep, patches)
    of_number = np.array([0] + [count(keep, n) for n in range(1, patches + 1)], np.int32)
    own = jnp.asarray(of_number)[places.mask.sum(1)]
    chosen = jnp.where(jnp.arange(most) < own[:, None], found[:, :most], patches - 1)
    return placement.by_batch(jnp.sort(chosen, axis=1).astype(jnp.int32))


def _in_cells(
    places: places_lib.Places, order: jax.Array, side: int
) -> tuple[jax.Array, jax.Array]:
    """How many real patches of its own cell of side x side come before each patch, and how many there are, [B, P] each."""
    cells = places.yx // side
    same = (cells[:, :, None] == cells[:, None]).all(-1) & places.mask[:, None]
    before = same & (order[:, None] < order[:, :, None])
    return before.sum(2), jnp.maximum(same.sum(2), 1)
