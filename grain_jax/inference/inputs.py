"""Images, boxes and classes that a Predictor is given: what it takes, and one line for what it cannot take."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import PIL.Image

from grain_jax import config as config_lib
from grain_jax.core import errors
from grain_jax.core import images as image_files
from grain_jax.input_pipeline import tokenizer

_FAR = 4.0  # of a corner in [0, 1]; one farther away is in pixels

# PIL images, uint8 [H, W, 3] or float32 [S, S, 3] to iterate over; uint8 [B, H, W, 3]; or float32 [B, S, S, 3]. PIL
# images are turned by their EXIF orientation, as a viewer shows them; arrays are taken as they are.
Images: TypeAlias = Iterable[PIL.Image.Image | np.ndarray] | np.ndarray
OneOrMany: TypeAlias = Images | PIL.Image.Image  # an array of three axes is one image


class Tokens(NamedTuple):
    """What the image tower gives for images, computed once for any number of boxes."""

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


def checked_boxes(index: int, boxes: Any) -> np.ndarray:
    """The boxes of an image as float32 [n, 4]. Raises InputError, which names the image by `index`."""
    try:
        found: Any = np.asarray(boxes, np.float32)
        fault = "" if np.isfinite(found).all() else f"got {found.tolist()}"
        if found.size == 0:
            found = found.reshape(0, 4)
        if found.ndim != 2 or found.shape[1] != 4:
            fault = f"got {list(found.shape)}"
    except (TypeError, ValueError):
        fault = f"got {boxes!r}"
    if fault:
        raise InputError(
            f"boxes_xyxy[{index}]: {fault}, expected finite numbers [n, 4], the corners x1, y1, x2, y2"
        )
    wrong = (found[:, :2] > found[:, 2:]).any(axis=1) | (np.abs(found) > _FAR).any(axis=1)
    if wrong.any():
        raise InputError(
            f"boxes_xyxy[{index}]: got {found[wrong.argmax()].tolist()}, expected x1 <= x2 and y1 <= y2 in [0, 1] of the"
            " image; divide pixels by its width and height"
        )
    return found


def boxes_of_images(boxes_xyxy: Any) -> list[np.ndarray]:
    """The boxes of each image as float32 [n, 4]. Raises InputError."""
    if isinstance(boxes_xyxy, (str, bytes)) or not isinstance(boxes_xyxy, Iterable):
        raise InputError(f"boxes_xyxy: got {boxes_xyxy!r}, expected boxes [n, 4] for each image")
    return [checked_boxes(i, x) for i, x in enumerate(boxes_xyxy)]


def resize(index: int, image: Any, size: int) -> np.ndarray:
    """The image resized to uint8 [size, size, 3]; float32 [size, size, 3], normalised, as it is.

    Raises InputError, which names the image by `index`.
    """
    if isinstance(image, PIL.Image.Image):
        try:
            image = image_files.to_rgb(image_files.upright(image))
        # PIL reads the pixels of a file only here, and raises many types of error.
        except Exception as error:
            raise InputError(
                f"images[{index}]: {' '.join(str(error).split())}, expected a readable image"
            ) from None
    elif getattr(image, "dtype", None) != np.uint8:
        dtype, shape = getattr(image, "dtype", None), getattr(image, "shape", ())
        if dtype == np.float32 and shape == (size, size, 3):
            return np.asarray(image)
        got = f"{dtype} {list(shape)}" if dtype else type(image).__name__
        raise InputError(
            f"images[{index}]: got {got}, expected a PIL image, uint8 [H, W, 3], or float32 [{size}, {size}, 3]"
            " already normalised"
        )
    try:
        return image_files.resize(image, size)
    except image_files.ImageError as error:
        raise InputError(f"images[{index}]: {error}") from None


def together(images: list[np.ndarray], tower: config_lib.ImageTower) -> np.ndarray:
    """Prepared images as a batch; normalised where some are."""
    if len({x.dtype for x in images}) > 1:
        images = [normalised(x, tower) for x in images]
    return np.stack(images)


def normalised(image: np.ndarray, tower: config_lib.ImageTower) -> np.ndarray:
    """uint8 [S, S, 3] as float32, as the model normalises it; float32 as it is."""
    if image.dtype != np.uint8:
        return image
    mean, std = (np.array(x, np.float32) for x in (tower.pixel_mean, tower.pixel_std))
    return (image.astype(np.float32) / 255 - mean) / std


def checked_images(images: Any, size: int) -> Images:
    """The images, if their type and shape are right; an array of floats as float32. Raises InputError.

    Args:
      images: any.
      size: of the squares that the model takes.
    """
    if isinstance(images, PIL.Image.Image):
        raise InputError("images: got one PIL image, expected a list of them")
    if not hasattr(images, "dtype"):
        if not isinstance(images, Iterable) or isinstance(images, (str, bytes)):
            raise InputError(
                f"images: got {type(images).__name__}, expected images to iterate over"
            )
        return images
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3:
        raise InputError(
            f"images: got shape {list(images.shape)}, expected [B, H, W, 3] or [H, W, 3]"
        )
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise InputError(f"images: got {images.dtype}, expected uint8, or float32 normalised")
    if images.shape[1:3] != (size, size):
        raise InputError(
            f"images: got float32 of {images.shape[1]} x {images.shape[2]} pixels, expected"
            f" {size} x {size}; give uint8 or PIL images to have them resized"
        )
    return images.astype(np.float32)


def class_pairs(
    classes: Iterable[str] | Mapping[str, Sequence[str]],
) -> list[tuple[str, Sequence[str] | None]]:
    """Classes, as `Predictor.class_features` takes them -> names with their descriptions, or None. Raises InputError."""
    pairs: list[tuple[str, Sequence[str] | None]]
    if isinstance(classes, Mapping):
        pairs = [*classes.items()]
    else:
        pairs = [] if isinstance(classes, str) else [(name, None) for name in classes]
    if not pairs:
        raise InputError(f"classes: got {classes!r}, expected names or {{name: descriptions}}")
    for name, own in pairs:
        if not isinstance(name, str) or isinstance(own, str):
            raise InputError(f"classes: at {name!r}, expected a name or name: [description, ...]")
        if own is not None and not len(own):
            raise InputError(f"classes: {name!r} has no description")
    return pairs
