"""What a Predictor takes: images, boxes, texts and classes, checked; each fault is one line."""

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeAlias, TypeGuard, TypeVar, overload

import jax
import numpy as np
import PIL.Image

from grain_jax import config as config_lib
from grain_jax.core import errors
from grain_jax.core import images as image_files
from grain_jax.input_pipeline import tokenizer

_FAR = 4.0  # a corner in [0, 1] may lie this far outside; one farther away is in pixels


class Tokens(NamedTuple):
    """The tokens of images, computed once for any number of boxes."""

    values: np.ndarray  # [B, N, E], in the dtype of the Predictor


# A path, a PIL image, or an array [H, W, 3], uint8 or float in [0, 1]; see `Predictor`.
OneImage: TypeAlias = str | os.PathLike[str] | PIL.Image.Image
Images: TypeAlias = Iterable[OneImage | np.ndarray] | np.ndarray | Tokens  # or an array [B, H, W, 3]
OneOrMany: TypeAlias = Images | OneImage  # an array of three axes is one image
Texts: TypeAlias = str | Iterable[str] | np.ndarray  # or token ids [L] or [N, L]
Method = TypeVar("Method", bound=Callable[..., Any])
P = ParamSpec("P")
One = TypeVar("One")
ClassTexts: TypeAlias = Iterable[str] | Mapping[str, Sequence[str]]  # names, or {name: descriptions}


class Normalized(NamedTuple):
    """Images that are resized and normalised already."""

    pixels: np.ndarray  # float32 [B, S, S, 3]


class InputError(errors.UserError):
    """Images, texts or classes that the model cannot take; the message is one line."""


tokenizer_of = functools.lru_cache(maxsize=8)(tokenizer.of_tower)


def is_one_image(images: Any) -> TypeGuard[OneImage]:
    """Whether it is one image, and not a batch."""
    return isinstance(images, (str, os.PathLike, PIL.Image.Image)) or getattr(images, "ndim", None) == 3


def one_or_many(method: Method) -> Method:
    """Makes a method of a batch of images take one, too: its results then lack the axis of the batch."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(self, images, *arguments, **options):
        if not is_one_image(images):
            return method(self, images, *arguments, **options)
        bound = signature.bind(self, [images], *arguments, **options)
        if "boxes_xyxy" in bound.arguments:  # of that image
            bound.arguments["boxes_xyxy"] = [bound.arguments["boxes_xyxy"]]
        results = method(*bound.args, **bound.kwargs)
        return jax.tree.map(lambda x: x[0], results) if isinstance(results, tuple) else results[0]

    return call  # pyright: ignore[reportReturnType]


class _Bound(Protocol[P, One]):
    @overload
    def __call__(self, images: OneImage, *args: P.args, **options: P.kwargs) -> One: ...  # pyright: ignore[reportOverlappingOverload]

    @overload
    def __call__(self, images: np.ndarray, *args: P.args, **options: P.kwargs) -> Any: ...

    @overload
    def __call__(self, images: Images, *args: P.args, **options: P.kwargs) -> list[One]: ...


class _Method(Protocol[P, One]):
    def __get__(self, instance: Any, owner: Any) -> _Bound[P, One]: ...


def for_each_image(method: Callable[Concatenate[Any, Any, P], list[One]]) -> _Method[P, One]:
    """`one_or_many` of a method that returns a list, with the types of both calls."""
    return one_or_many(method)  # pyright: ignore[reportReturnType]


def marked(images: Any, normalized: bool) -> Any:
    """`images`, as `Normalized` if they are. Raises InputError: arrays of another kind."""
    if not normalized or isinstance(images, (Normalized, Tokens)):
        return images
    pixels = np.asarray(images if hasattr(images, "dtype") else list(images))
    if pixels.dtype.kind != "f" or pixels.ndim != 4:
        raise InputError(f"images: got {kind_of(pixels)}, expected float32 [B, S, S, 3] with normalized=True")
    return Normalized(pixels.astype(np.float32))


def is_one_text(texts: Any) -> bool:
    """Whether it is one text, a string or token ids [L], and not a batch."""
    return isinstance(texts, str) or getattr(texts, "ndim", None) == 1


def one_text(text: Any) -> Any:
    """A text as a batch of one."""
    return [text] if isinstance(text, str) else np.asarray(text)[None]


def checked_boxes(boxes_xyxy: Any) -> list[np.ndarray]:
    """The boxes of each image as float32 [n, 4]. Raises InputError."""
    if isinstance(boxes_xyxy, (str, bytes)) or not isinstance(boxes_xyxy, Iterable):
        raise InputError(f"boxes_xyxy: got {boxes_xyxy!r}, expected boxes [n, 4] for each image")
    return [_boxes_of_image(f"boxes_xyxy[{i}]", boxes) for i, boxes in enumerate(boxes_xyxy)]


def _boxes_of_image(name: str, boxes: Any) -> np.ndarray:
    try:
        corners = np.asarray(boxes, np.float32)
    except (TypeError, ValueError):
        corners = np.full(1, np.nan)
    corners = corners if corners.size else corners.reshape(0, 4)
    if corners.shape[1:] != (4,) or not np.isfinite(corners).all():
        got = " ".join(repr(boxes).split())
        expected = "finite numbers [n, 4], the corners x1, y1, x2, y2"
        raise InputError(f"{name}: got {got:.200}, expected {expected}")
    wrong = (corners[:, :2] > corners[:, 2:]).any(axis=1) | (np.abs(corners) > _FAR).any(axis=1)
    if wrong.any():
        expected = "x1 <= x2 and y1 <= y2, as shares of the image; divide pixels by its width and height"
        raise InputError(f"{name}: got {corners[wrong.argmax()].tolist()}, expected {expected}")
    return corners


def resize(index: int, image: Any, size: int) -> np.ndarray:
    """The image resized to uint8 [size, size, 3]. Raises InputError, which names the image by `index`."""
    try:
        return image_files.resize(as_uint8(index, image), size)
    except image_files.ImageError as error:
        raise InputError(f"images[{index}]: {error}") from None


def as_uint8(index: int, image: Any) -> np.ndarray:
    """A path, a PIL image or an array as uint8 [H, W, 3]. Raises InputError, which names the `index`."""
    name, wanted = f"images[{index}]", "uint8 or float [H, W, 3] with values in [0, 1]"
    if isinstance(image, (str, os.PathLike)):
        try:
            image = image_files.load_image(image)
        except image_files.ImageError as error:
            raise InputError(f"{name}: {error}") from None
    if isinstance(image, PIL.Image.Image):
        try:
            return np.asarray(image_files.to_rgb(image_files.upright(image)))
        # PIL reads the pixels of a file only here, and raises many types of error.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{name}: {reason}, expected a readable image") from None
    if getattr(image, "dtype", None) == np.uint8:
        return np.asarray(image)
    if not hasattr(image, "dtype") or np.asarray(image).dtype.kind != "f" or image.shape[2:] != (3,):
        raise InputError(f"{name}: got {kind_of(image)}, expected a path, a PIL image, or {wanted}")
    image = np.asarray(image, np.float32)
    if not 0 <= image.min(initial=0) <= image.max(initial=0) <= 1:
        got = f"{kind_of(image)} from {image.min():.3g} to {image.max():.3g}"
        more = "normalised images need normalized=True"
        raise InputError(f"{name}: got {got}, expected {wanted}; {more}")
    return np.round(image * 255).astype(np.uint8)


def kind_of(value: Any) -> str:
    """What an argument is, for messages: its type, or its dtype and shape."""
    return f"{value.dtype} {list(value.shape)}" if hasattr(value, "dtype") else type(value).__name__


def normalised(image: np.ndarray, tower: config_lib.ImageTower) -> np.ndarray:
    """uint8 [S, S, 3] as float32, normalised as in the model."""
    mean, std = (np.array(x, np.float32) for x in (tower.pixel_mean, tower.pixel_std))
    return (image.astype(np.float32) / 255 - mean) / std


def checked_images(images: Any, size: int) -> Any:
    """A batch of images for a model of `size` pixels, if its type is right. Raises InputError."""
    pixels = images.pixels if isinstance(images, Normalized) else images
    if isinstance(images, Normalized) and pixels.shape[1:] != (size, size, 3):
        expected = f"float32 [B, {size}, {size}, 3] with normalized=True"
        raise InputError(f"images: got {kind_of(pixels)}, expected {expected}")
    if isinstance(images, bytes) or not isinstance(pixels, Iterable):
        raise InputError(f"images: got {kind_of(images)}, expected images to iterate over")
    if hasattr(pixels, "dtype") and getattr(pixels, "ndim", 4) != 4:
        raise InputError(f"images: got {kind_of(pixels)}, expected [B, H, W, 3]")
    return images


def class_pairs(classes: ClassTexts) -> list[tuple[str, Sequence[str] | None]]:
    """Classes -> names with their descriptions, or None. Raises InputError."""
    pairs: list[tuple[str, Sequence[str] | None]] = []
    if not isinstance(classes, str):
        pairs = [*classes.items()] if isinstance(classes, Mapping) else [(name, None) for name in classes]
    if not pairs:
        raise InputError(f"classes: got {classes!r}, expected names or {{name: descriptions}}")
    for name, descriptions in pairs:
        if not isinstance(name, str) or isinstance(descriptions, str):
            raise InputError(f"classes: at {name!r}, expected a name or name: [description, ...]")
        if descriptions is not None and not len(descriptions):
            raise InputError(f"classes: {name!r} has no description")
    return pairs
