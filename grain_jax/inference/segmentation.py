"""Open-vocabulary segmentation: the class of every pixel, from cosines of patches or regions and class names.

The image is resized and cut into windows of the model's size. Each window gets a map per class (MaskCLIP,
Zhou et al. 2022, arXiv 2112.01071); overlapping maps are averaged. The maps are resized to the image,
bilinearly, and each pixel gets the class with the largest cosine.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from scipy import sparse

from grain_jax import config as config_lib
from grain_jax.core import images as image_files
from grain_jax.core import named
from grain_jax.inference import inputs, prompts, scores
from grain_jax.inference.inputs import InputError

BACKGROUND = -1  # the label of pixels below the threshold
AT_ONCE = 16  # images whose windows are in memory
MAX_CANVAS = 1 << 22  # pixels of a resized image
MAX_NUMBERS = 1 << 29  # float32 numbers, one for each class, of these pixels: 2 GiB
_BAND = 1 << 18  # numbers of the maps that are as large as the image at one time: what a cache holds


class Classes(NamedTuple):
    """Embeddings of C classes with A names in all: a class has the best cosine of its names."""

    names: tuple[str, ...]
    features: np.ndarray  # float32 [A, D], class by class
    first: np.ndarray  # int [C], the position of the first name of each class

    def cosines(self, embed: np.ndarray) -> np.ndarray:
        """Embeddings [..., D] -> float32 [..., C]; where features are shorter than 1, so are the cosines."""
        cosines = scores.unit(embed) @ self.features.T
        if len(self.features) == len(self.first):
            return cosines
        return np.maximum.reduceat(cosines, self.first, axis=-1)


def alternatives(name: str) -> list[str]:
    """The names of a class, which commas divide: "sofa, couch" -> ["sofa", "couch"]."""
    return [part for part in map(str.strip, name.split(",")) if part]


def embed_classes(
    encode: prompts.Encode,
    names: Sequence[str],
    templates: Sequence[str],
    descriptions: Sequence[Sequence[str] | None] | None = None,
    unit_length: bool = True,
) -> Classes:
    """`prompts.embed_classes`, where commas in a name divide alternatives, each with its own embedding."""
    parts = [alternatives(name) or [name] for name in names]
    counts = list(map(len, parts))
    of_parts = [x for x, n in zip(descriptions, counts) for _ in range(n)] if descriptions else None
    features = prompts.embed_classes(encode, sum(parts, []), templates, of_parts, unit_length)
    return Classes(tuple(names), features, np.cumsum([0, *counts[:-1]]))


class Windows(NamedTuple):
    """The windows of an image."""

    pixels: np.ndarray  # uint8 [n, S, S, 3]
    corners: np.ndarray  # int [n, 2], row and column of the first pixel of each
    canvas: tuple[int, int]  # rows and columns of the resized image
    size: tuple[int, int]  # width and height of the image


def cut(image: PIL.Image.Image, size: int, short_side: int = 0, stride: int = 0, classes: int = 1) -> Windows:
    """The windows of an image of any mode and size; the last ones end at its edges.

    Args:
      image: the image.
      size: pixels S along a window's side.
      short_side: pixels that the shorter side is resized to; 0: S.
      stride: pixels between windows; 0: half of S, rounded up.
      classes: how many maps each window will have.

    Raises ImageError: resized, it would have more than MAX_CANVAS pixels, or MAX_NUMBERS for all classes.
    """
    width, height = image.size
    short = max(short_side, size)
    columns, rows = (max(short, round(edge * short / min(width, height))) for edge in (width, height))
    most = min(MAX_CANVAS, MAX_NUMBERS // classes)
    if columns * rows > most:
        advice = "; a smaller short_side makes fewer" if short > size else ""
        raise image_files.TooLargeError(
            f"got {width} x {height} pixels, which become {columns} x {rows}, expected at most"
            f" {most:,} in all of {classes} classes{advice}"
        )
    image = image_files.to_rgb(image)
    if image.size != (columns, rows):
        image = image.resize((columns, rows), PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    step = stride or -(-size // 2)
    corners = list(itertools.product(_starts(rows, size, step), _starts(columns, size, step)))
    windows = np.stack([pixels[y : y + size, x : x + size] for y, x in corners])
    return Windows(windows, np.array(corners), (rows, columns), (width, height))


def windows_of(index: int, image: Any, *options: int) -> Windows:
    """`cut` of an image, if it is not yet. Raises InputError, which names the image by `index`."""
    if isinstance(image, Windows):
        return image
    pixels = inputs.as_uint8(index, image)
    try:
        return cut(PIL.Image.fromarray(pixels), *options)
    except image_files.ImageError as error:
        raise InputError(f"images[{index}]: {error}") from None


def _starts(length: int, size: int, step: int) -> list[int]:
    """Where windows begin along a side."""
    return sorted({min(x, length - size) for x in range(0, length - size + step, step)})


def labels(
    maps: np.ndarray,
    windows: Windows,
    *,
    background: float | None = None,
    scale: float = 1.0,
    skip: int | None = None,
) -> np.ndarray:
    """The class of each pixel of the image, int32 [H, W].

    Args:
      maps: [n, C, h, w], of the windows.
      windows: of the image.
      background: pixels whose best class has a smaller share of the softmax are BACKGROUND; None: none.
      scale: of the cosines in that softmax.
      skip: a class that no pixel gets, and that the softmax leaves out.
    """
    parts = []
    for band in _resized(_overlapped(maps, windows), *windows.size):
        if skip is not None:
            band[:, :, skip] = -np.inf
        best = band.argmax(axis=2).astype(np.int32)
        if background is not None:
            top = band.max(axis=2, keepdims=True)
            share = 1 / np.exp(np.float32(scale) * (band - top)).sum(axis=2)
            best[share < background] = BACKGROUND
        parts.append(best)
    return np.concatenate(parts)


def _overlapped(maps: np.ndarray, windows: Windows) -> np.ndarray:
    """Maps [n, C, h, w] -> float32 [rows, columns, C] of the resized image, means where windows overlap."""
    size = windows.pixels.shape[1]
    down, across = (scores.bilinear(size, cells).astype(np.float32) for cells in maps.shape[2:])
    canvas = np.zeros((*windows.canvas, maps.shape[1]), np.float32)
    count = np.zeros((*windows.canvas, 1), np.float32)
    for map_, (y, x) in zip(maps, windows.corners, strict=True):
        cells = np.moveaxis(np.asarray(map_, np.float32), 0, -1)  # [h, w, C]
        rows = (down @ cells.reshape(len(cells), -1)).reshape(size, *cells.shape[1:])
        canvas[y : y + size, x : x + size] += across @ rows  # [S, S, C]
        count[y : y + size, x : x + size] += 1
    canvas /= count
    return canvas


def _resized(canvas: np.ndarray, width: int, height: int) -> Iterator[np.ndarray]:
    """The canvas [rows, columns, C] resized to [height, width, C], in bands of rows."""
    rows, columns, classes = canvas.shape
    weights = lambda size, cells: sparse.csr_array(scores.bilinear(size, cells).astype(np.float32))
    down, across = weights(height, rows), weights(width, columns)
    most = max(1, _BAND // (width * classes))
    for first in range(0, height, most):
        band = canvas[first : first + most]
        if rows != height:
            band = (down[first : first + most] @ canvas.reshape(rows, -1)).reshape(-1, columns, classes)
        yield band if columns == width else np.stack([across @ row for row in band])


def maps_by(model: config_lib.Model, by: str, patch_features: str) -> tuple[str, str]:
    """The options of `Predictor.class_maps` without "auto". Raises InputError: the model cannot use one."""
    options = (("by", by, config_lib.MAPS_BY), ("patch_features", patch_features, config_lib.PATCH_FEATURES))
    for name, value, known in options:
        if value not in known:
            raise InputError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
    has_head, external = model.boxes.kind != "none", named.is_external(model.image.tower)
    has_patches = has_head or model.tower_pools
    has_regions = model.boxes.proposals or (model.decoder is not None and model.decoder.queries > 0)
    if by == "auto":
        by = "patches" if not has_regions else "both" if has_patches else "regions"
    if by != "patches" and not has_regions:
        raise InputError(f"by: got {by!r} and a model that finds no regions, expected 'patches'")
    if by != "regions" and not has_patches:
        raise InputError(
            f"by: got {by!r} and a model with a decoder and no box head, expected a box head"
            " (model.boxes.kind), or 'regions' with region queries"
        )
    if patch_features == "auto":
        patch_features = "tokens" if has_head or external else "values"
    if by != "regions" and patch_features == "values" and external:
        got = f"'values' with the tower {model.image.tower}"
        raise InputError(f"patch_features: got {got}, expected 'tokens'")
    return by, patch_features


def check_stride(size: int, short_side: int, stride: int) -> None:
    """Raises InputError if a model of `size` pixels cannot use these options of `cut`."""
    wanted = f"{size}, the model's image size"
    if short_side and short_side < size:
        raise InputError(f"short_side: got {short_side}, expected 0 or at least {wanted}")
    if not 0 <= stride <= size:
        raise InputError(f"stride: got {stride}, expected 1 to {wanted}, or 0 for half of it")
