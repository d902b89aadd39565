"""What a Predictor takes: images, boxes, texts and classes, checked; each fault is one line."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import PIL.Image

from grain_jax import config as config_lib
from grain_jax.core import errors
from grain_jax.core import images as image_files
from grain_jax.input_pipeline import tokenizer

_FAR = 4.0  # a corner in [0, 1] may lie this far outside; one farther away is in pixels

# Images to iterate over (PIL, uint8 [H, W, 3] or float32 [S, S, 3]), or an array [B, H, W, 3]; see `Predictor`.
Images: TypeAlias = Iterable[PIL.Image.Image | np.ndarray] | np.ndarray
OneOrMany: TypeAlias = Images | PIL.Image.Image  # an array of three axes is one image
Texts: TypeAlias = str | Iterable[str] | np.ndarray  # or token ids [L] or [N, L]
ClassTexts: TypeAlias = (
    Iterable[str] | Mapping[str, Sequence[str]]
)  # names, or {name: descriptions}


class Tokens(NamedTuple):
    """The tokens of images, computed once for any number of boxes."""

    values: np.ndarray  # [B, N, E], in the dtype of the Predictor


class InputError(errors.UserError):
    """Images, texts or classes that the model cannot take; the message is one line."""


@functools.lru_cache(maxsize=8)
def tokenizer_of(tower: config_lib.TextTower, folder: Any) -> tokenizer.Tokenizer:
    """`tokenizer.of_tower`, read once."""
    return tokenizer.of_tower(tower, folder)


def is_one_image(images: Any) -> bool:
    """Whether it is one image, and not a batch."""
    return isinstance(images, PIL.Image.Image) or getattr(images, "ndim", None) == 3


def is_one_text(texts: Any) -> bool:
    """Whether it is one text, a string or token ids [L], and not a batch."""
    return isinstance(texts, str) or getattr(texts, "ndim", None) == 1


def one_text(text: Any) -> Any:
    """A text as a batch of one."""
    return [text] if isinstance(text, str) else np.asarray(text)[None]


def one_image(image: Any) -> Images:
    """An image as a batch of one. Raises InputError."""
    if isinstance(image, PIL.Image.Image):
        return [image]
    image = np.asarray(image)
    if image.ndim != 3:
        raise InputError(f"image: got shape {list(image.shape)}, expected [H, W, 3]")
    return image[None] if image.dtype.kind == "f" else [image]


def checked_boxes(boxes_xyxy: Any) -> list[np.ndarray]:
    """The boxes of each image as float32 [n, 4]. Raises InputError."""
    if isinstance(boxes_xyxy, (str, bytes)) or not isinstance(boxes_xyxy, Iterable):
        raise InputError(f"boxes_xyxy: got {boxes_xyxy!r}, expected boxes [n, 4] for each image")
    return [_boxes_of_image(f"boxes_xyxy[{i}]", boxes) for i, boxes in enumerate(boxes_xyxy)]


def _boxes_of_image(name: str, boxes: Any) -> np.ndarray:
    try:
        corners = np.asarray(boxes, np.float32)
    except (TypeError, ValueError):
        corners = None
    if corners is not None and corners.size == 0:
        corners = corners.reshape(0, 4)
    if corners is None or corners.shape[1:] != (4,) or not np.isfinite(corners).all():
        got = " ".join(repr(boxes).split())
        raise InputError(
            f"{name}: got {got:.200}, expected finite numbers [n, 4], the corners x1, y1, x2, y2"
        )
    wrong = (corners[:, :2] > corners[:, 2:]).any(axis=1) | (np.abs(corners) > _FAR).any(axis=1)
    if wrong.any():
        raise InputError(
            f"{name}: got {corners[wrong.argmax()].tolist()}, expected x1 <= x2 and y1 <= y2, as shares of the"
            " image; divide pixels by its width and height"
        )
    return corners


def resize(index: int, image: Any, size: int) -> np.ndarray:
    """The image resized to uint8 [size, size, 3]; normalised float32 [size, size, 3] stays as it is.

    Raises InputError, which names the image by `index`.
    """
    name = f"images[{index}]"
    if isinstance(image, PIL.Image.Image):
        try:
            image = image_files.to_rgb(image_files.upright(image))
        # PIL reads the pixels of a file only here, and raises many types of error.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{name}: {reason}, expected a readable image") from None
    elif getattr(image, "dtype", None) != np.uint8:
        if getattr(image, "dtype", None) == np.float32 and image.shape == (size, size, 3):
            return np.asarray(image)
        raise InputError(
            f"{name}: got {kind_of(image)}, expected a PIL image, uint8 [H, W, 3], or float32 [{size}, {size}, 3]"
            " already normalised"
        )
    try:
        return image_files.resize(image, size)
    except image_files.ImageError as error:
        raise InputError(f"{name}: {error}") from None


def kind_of(value: Any) -> str:
    """What an argument is, for messages: its type, or its dtype and shape."""
    if hasattr(value, "dtype"):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def together(images: list[np.ndarray], tower: config_lib.ImageTower) -> np.ndarray:
    """Prepared images as a batch: all are normalised if one of them is."""
    if len({x.dtype for x in images}) > 1:
        images = [normalised(x, tower) for x in images]
    return np.stack(images)


def normalised(image: np.ndarray, tower: config_lib.ImageTower) -> np.ndarray:
    """uint8 [S, S, 3] as float32, normalised as in the model; float32 as it is."""
    if image.dtype != np.uint8:
        return image
    mean, std = (np.array(x, np.float32) for x in (tower.pixel_mean, tower.pixel_std))
    return (image.astype(np.float32) / 255 - mean) / std


def checked_images(images: Any, size: int) -> Images:
    """A batch of images for a model of `size` pixels, if its type is right; floats as float32. Raises InputError."""
    if not hasattr(images, "dtype"):
        no_batch = isinstance(images, (PIL.Image.Image, str, bytes))
        if no_batch or not isinstance(images, Iterable):
            raise InputError(f"images: got {kind_of(images)}, expected images to iterate over")
        return images
    images = np.asarray(images)
    is_float = images.dtype.kind == "f"
    if images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8:
        return images
    if is_float and images.shape[1:] == (size, size, 3):
        return images.astype(np.float32)
    raise InputError(
        f"images: got {kind_of(images)}, expected uint8 [B, H, W, 3], which is resized, or float32"
        f" [B, {size}, {size}, 3] already normalised"
    )


def class_pairs(classes: ClassTexts) -> list[tuple[str, Sequence[str] | None]]:
    """Classes -> names with their descriptions, or None. Raises InputError."""
    pairs: list[tuple[str, Sequence[str] | None]]
    if isinstance(classes, Mapping):
        pairs = [*classes.items()]
    else:
        pairs = [] if isinstance(classes, str) else [(name, None) for name in classes]
    if not pairs:
        raise InputError(f"classes: got {classes!r}, expected names or {{name: descriptions}}")
    for name, descriptions in pairs:
        if not isinstance(name, str) or isinstance(descriptions, str):
            raise InputError(f"classes: at {name!r}, expected a name or name: [description, ...]")
        if descriptions is not None and not len(descriptions):
            raise InputError(f"classes: {name!r} has no description")
    return pairs
