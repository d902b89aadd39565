"""Images in their own shape: the grid of patches that fits a length, and an image as its patches.

The rule is that of SigLIP 2's NaFlex (Tschannen et al. 2025, arXiv 2502.14786, section 2.4.2) as Siglip2ImageProcessor
of transformers has it: one scale for both sides, each then rounded up to whole patches. Needs no TensorFlow, no JAX.
"""

from typing import Any

import numpy as np
import PIL.Image

from grain_jax.core import images
from grain_jax.core.schema import Patches

# That processor halves an interval of scales until it is narrower than 1e-5: 24 times.
_LOWEST, _HIGHEST, _STEPS = 1e-6, 100.0, 2**24
LENGTHS = (64, 144, 256, 576, 784, 1024)  # patches, as NaFlex models have


def grid(
    height: Any, width: Any, patch: int, length: Any, xp: Any = np, most: int | None = None
) -> tuple[Any, Any]:
    """The largest grid of at most `length` patches for images of these sizes.

    Rows and columns are ceil(s height / patch) and ceil(s width / patch) with the largest scale s at which their
    product is at most `length`, rounded down to the scales of that processor, so at most 100.

    Args:
      height: pixels, a number or an array [...].
      width: as height.
      patch: pixels of a side of a patch.
      length: patches, N.
      xp: numpy, or a module with its functions (TensorFlow's).
      most: the largest `length`, where that is a tensor.

    Returns: rows and columns, int32 [...] each.
    """
    height, width = (xp.asarray(x, np.float64)[..., None] / patch for x in (height, width))
    rows = xp.arange(1, (most or length) + 1, dtype=np.int64)
    # With at most so many rows there are at most length / rows columns; the best scale is that of one of these. Of
    # integers: in a graph, TensorFlow makes a product with 1 / rows of a division of floats, 48.99.. for 49.
    columns = xp.asarray(length, np.int64) // rows
    rows, columns = (xp.asarray(x, np.float64) for x in (rows, columns))
    scale = xp.max(xp.minimum(rows / height, columns / width), axis=-1, keepdims=True)
    step = (_HIGHEST - _LOWEST) / _STEPS
    scale = _LOWEST + step * xp.clip(xp.floor((scale - _LOWEST) / step), 0.0, _STEPS - 1.0)
    found = (xp.maximum(1.0, xp.ceil(scale * side))[..., 0] for side in (height, width))
    rows, columns = (xp.asarray(x, np.int32) for x in found)
    return rows, columns


def of_pixels(image: np.ndarray, patch: int, length: int) -> np.ndarray:
    """An image of whole patches as patches, row by row, then zeros.

    Args:
      image: [h patch, w patch, 3], h w <= length.
      patch: P, pixels.
      length: N.

    Returns: [N, P * P * 3], each patch by (y, x, channel).
    """
    height, width, channels = image.shape
    parts = image.reshape(height // patch, patch, width // patch, patch, channels)
    parts = parts.swapaxes(1, 2).reshape(-1, patch * patch * channels)
    return np.pad(parts, [(0, length - len(parts)), (0, 0)])


def of_image(image: PIL.Image.Image | np.ndarray, patch: int, length: int) -> Patches:
    """An image resized to its `grid`, as the patches of one image.

    Resized by PIL, bilinear and antialiased; the pixels are those of transformers' Siglip2ImageProcessorPil.

    Args:
      image: PIL image of any mode, or uint8 [H, W, 3] or [H, W].
      patch: P, pixels.
      length: N.

    Returns: pixels uint8 [N, P * P * 3], grid int32 [2].

    Raises:
      ImageError: another array, or an image that has no range (mode F).
    """
    image = images.to_rgb(images.of_array(image))
    rows, columns = (int(x) for x in grid(image.height, image.width, patch, length))
    size = columns * patch, rows * patch
    if image.size != size:
        image = image.resize(size, PIL.Image.Resampling.BILINEAR)
    pixels = of_pixels(np.asarray(image), patch, length)
    return Patches(pixels, np.array([rows, columns], np.int32))


def as_rows(image: Patches) -> np.ndarray:
    """The patches of an image, uint8 [N, D] and [2], as one array for those who pass on arrays alone.

    Returns: uint8 [N + 1, D]; the last row begins with the bytes of the grid, int32, the lowest first.
    """
    last = np.zeros((1, image.pixels.shape[1]), np.uint8)
    last[0, :8] = image.grid.astype("<i4").view(np.uint8)
    return np.concatenate([image.pixels, last])


def of_rows(rows: Any) -> Patches:
    """What `as_rows` gave, for a batch: uint8 [B, N + 1, D], numpy or jax -> [B, N, D] and int32 [B, 2]."""
    found = rows[:, -1, :8].astype(np.int32).reshape(-1, 2, 4)
    return Patches(rows[:, :-1], (found << np.array([0, 8, 16, 24], np.int32)).sum(2, np.int32))


def stack(parts: list[Patches]) -> Patches:
    """Patches of single images as those of a batch."""
    return Patches(*(np.stack(field) for field in zip(*parts, strict=True)))
