"""Images read and resized as in the reference: by PIL, to a square, with its antialiased bicubic filter.

Used where records are built and where a model is served; needs neither TensorFlow nor JAX. The resize of the
training input (input_pipeline/transforms.py) is measured against this one.
"""

import io
import warnings

import numpy as np
import PIL.Image
from etils import epath

from grain_jax import errors
from grain_jax.files import image_bounds, regular_file

_NO_RANGE = "mode F has no fixed range, expected 8 or 16 bits a colour"
_READABLE = "JPEG, PNG, WebP, GIF, BMP or TIFF"
# All others are refused. Pillow reads many more, some through other programs: EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class ImageError(errors.UserError):
    """An image cannot be read; the message says which and why."""


class UnknownFormatError(ImageError):
    """None of FORMATS."""


class TooLargeError(ImageError):
    """Beyond a bound of `image_bounds`."""


def open_image(encoded: bytes, name: str = "picture") -> PIL.Image.Image:
    """The image in `encoded` with its size, mode and format; the pixels are not decoded yet.

    Args:
      encoded: a file of one of FORMATS; of several frames the first is taken.
      name: of the image, for errors.

    Raises:
      ImageError: not such a file, damaged, or beyond a bound of `image_bounds`.
    """
    if fault := image_bounds.fault(encoded):
        raise TooLargeError(f"{name}: {fault}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; the pixels alone count
            image = PIL.Image.open(io.BytesIO(encoded), formats=FORMATS)
    except PIL.UnidentifiedImageError:
        raise UnknownFormatError(
            f"{name}: {len(encoded)} bytes that are no known image format, expected {_READABLE}"
        ) from None
    except PIL.Image.DecompressionBombError as error:
        raise TooLargeError(f"{name}: {error}") from None
    except Exception as error:  # PIL's readers raise OSError, SyntaxError, struct.error and more
        raise _damaged(name, error) from None
    if fault := image_bounds.pixels_fault(image.size):
        raise TooLargeError(f"{name}: {fault}")
    return image


def decode_image(encoded: bytes, name: str = "picture") -> PIL.Image.Image:
    """The image in `encoded` (one of FORMATS), decoded, in its own mode.

    The orientation tag of cameras is not applied: boxes are in pixels of the file, and tf.data does not apply it
    either.

    Raises:
      ImageError: as `open_image`; also truncated, or of floats, which have no fixed range.
    """
    image = open_image(encoded, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    except Exception as error:
        raise _damaged(name, error) from None
    if image.mode == "F":
        raise ImageError(f"{name}: {_NO_RANGE}")
    return image


def _damaged(name: str, error: Exception) -> ImageError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ImageError(f"{name}: {reason}, expected a readable image")


def read_file(path: epath.PathLike, name: str | None = None) -> bytes:
    """The content of an image file, local or remote; `name` is its name in errors, by default the path.

    Raises:
      OSError: there is none, or it cannot be read.
      ImageError: not a regular file (a link to one is), or too long. Neither is opened.
    """
    path = epath.Path(path)
    length = regular_file.length(path)
    if length is None:
        raise ImageError(f"{name or path}: got a folder, pipe or device, expected an image file")
    if length > image_bounds.MAX_BYTES:
        raise TooLargeError(
            f"{name or path}: got {length:,} bytes, expected at most {image_bounds.MAX_BYTES:,}"
        )
    with path.open("rb") as file:
        return file.read(length)


def load_image(path: epath.PathLike) -> PIL.Image.Image:
    """The image at `path` (local or remote). Raises ImageError."""
    try:
        encoded = read_file(path)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{path}: {reason}, expected a readable image") from None
    return decode_image(encoded, str(path))


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image of any mode as RGB; of 16 bits the upper eight are taken, as in tf.data (PIL clips at 255).

    Raises:
      ImageError: mode F, whose numbers have no fixed range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and np.max(image.getextrema()) > 255):
        return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(_NO_RANGE)
    if image.mode == "P":  # PIL warns where a palette with transparency becomes RGB at once
        image = image.convert("RGBA")
    return image.convert("RGB")


def resize(
    image: PIL.Image.Image | np.ndarray, size: int, *, convert_first: bool = True
) -> np.ndarray:
    """Resizes an image to a square, without a crop; the aspect ratio is not kept.

    Equals torchvision's `Resize((size, size), BICUBIC)` on PIL images. Which of its two passes
    Pillow runs first differs between versions (13.0 from earlier ones), by a few levels at worst.

    DIFFERS: the reference resizes first and converts to RGB afterwards, which takes nearest neighbours for
    palette images and the hidden colours of transparent pixels. Here the conversion comes first; RGB and grey
    images are the same either way. `convert_first=False` is the order of the reference.

    Args:
      image: PIL image of any mode, or uint8 [H, W, 3] or [H, W].
      size: pixels of an edge of the square, S.

    Returns: uint8 [S, S, 3].
    """
    if not isinstance(image, PIL.Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise ImageError(
                f"got an array {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3]"
            )
        image = PIL.Image.fromarray(image)
    if convert_first:
        image = to_rgb(image)
    if image.size != (size, size):
        image = image.resize((size, size), PIL.Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))
