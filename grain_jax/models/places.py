"""Where the patch tokens of images lie, when they are no full square.

So it is with images in their own shape (`schema.Patches`), and where the tower sees some of the patches alone. None
stands for a full square, row by row. Leading tokens have no place; they are always real.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.core import errors, schema


class Places(NamedTuple):
    """The places of P patch tokens an image."""

    yx: jax.Array  # int32 [B, P, 2], row and column of the patch; zeros where it is not real
    grid: jax.Array  # int32 [B, 2], rows and columns of the image's grid
    mask: jax.Array  # bool [B, P], whether the token is a patch of the image


def of_grid(grid: jax.Array, length: int) -> Places:
    """All patches of images with these grids, int32 [B, 2], row by row; `length` tokens an image."""
    rows, columns = (x[:, None] for x in jnp.asarray(grid).T)
    number = jnp.arange(length)
    mask = number < rows * columns
    yx = jnp.stack(jnp.divmod(number, jnp.maximum(columns, 1)), axis=-1)
    return Places(jnp.where(mask[..., None], yx, 0), jnp.asarray(grid), mask)


def of_square(images: int, side: int) -> Places:
    """All patches of square images."""
    return of_grid(jnp.full((images, 2), side, jnp.int32), side * side)


def at(places: Places, kept: jax.Array) -> Places:
    """The places of some tokens, by their numbers, int32 [B, n]."""
    yx = jnp.take_along_axis(places.yx, kept[..., None], axis=1)
    return Places(yx, places.grid, jnp.take_along_axis(places.mask, kept, axis=1))


def of_images(
    image: jax.Array | schema.Patches, patch_size: int, kept: jax.Array | None = None
) -> Places | None:
    """The places of the tokens that the tower makes of these images; None: all patches of squares.

    Args:
      image: [B, S, S, 3], or Patches.
      patch_size: pixels of a patch along each side.
      kept: int32 [B, n], the numbers of the patches that the tower sees; None: all.
    """
    if isinstance(image, schema.Patches):
        found = of_grid(image.grid, image.pixels.shape[1])
    elif kept is None:
        return None
    else:
        found = of_square(image.shape[0], image.shape[1] // patch_size)
    return found if kept is None else at(found, kept)


def real(places: Places, tokens: int) -> jax.Array:
    """Which of so many tokens are real, the leading ones among them: bool [B, N]."""
    leading = tokens - places.mask.shape[1]
    return jnp.pad(places.mask, ((0, 0), (leading, 0)), constant_values=True)


def keys(places: Places | None, tokens: int) -> jax.Array | None:
    """The mask of an attention to the tokens, bool [B, 1, 1, N]; None: all are real."""
    return None if places is None else real(places, tokens)[:, None, None]


def mean(patches: jax.Array, places: Places | None) -> jax.Array:
    """The mean of the real ones of the patches [B, P, E]: [B, E]."""
    if places is None:
        return patches.mean(axis=1)
    count = jnp.maximum(places.mask.sum(1, keepdims=True), 1).astype(jnp.float32)
    total = jnp.where(places.mask[..., None], patches, 0).astype(jnp.float32).sum(1)
    return (total / count).astype(patches.dtype)


def boxes(places: Places) -> jax.Array:
    """The box of each patch, xyxy as shares of the image, float32 [B, P, 4]."""
    yx, sides = places.yx.astype(jnp.float32), jnp.maximum(places.grid, 1)[:, None]
    low, high = yx / sides, (yx + 1) / sides
    return jnp.concatenate([low[..., ::-1], high[..., ::-1]], axis=-1)


def check(image: schema.Patches, patch_size: int) -> None:
    """Whether patches have the size that the tower takes. Raises UserError."""
    shape, expected = image.pixels.shape, 3 * patch_size**2
    if len(shape) != 3 or shape[2] != expected:
        raise errors.UserError(
            f"image: got patches {list(shape)}, expected [images, patches, {expected}] for model.image.patch_size ="
            f" {patch_size}"
        )


def of_pixels(image: jax.Array | np.ndarray, patch_size: int) -> jax.Array:
    """Images [B, H, W, C] of whole patches -> their patches row by row, [B, P, p*p*C]."""
    batch, height, width, channels = image.shape
    p = patch_size
    x = jnp.reshape(image, (batch, height // p, p, width // p, p, channels))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)
