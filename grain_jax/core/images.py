"""Images read and resized as in the reference: by PIL, to a square, with its antialiased bicubic filter.

Builds and served models read images with this; it needs neither TensorFlow nor JAX. The resize of the
training input (input_pipeline/transforms.py) is measured against this one. A file is bounded in bytes, and in
pixels by Pillow, which reads its header first.

A camera that is held upright stores a photograph on its side, and an EXIF tag says how to turn it.
`orientation` says which pixels are meant: "exif" for what a viewer shows, or "file" for what PIL gives, as in
the reference and in records. A TIFF is turned in both, since PIL turns it. XMP is not read.
"""

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from etils import epath

from grain_jax.core import errors, regular_file

# A photograph of 179 million pixels, the most that Pillow and tf.io decode, takes 0.2 to 1.5 bytes per pixel.
MAX_BYTES = 256 << 20
_NO_RANGE = "mode {} has no fixed range, expected 8 or 16 bits a colour"  # floats, 32-bit integers
_READABLE = "JPEG, PNG, WebP, GIF, BMP or TIFF"
# All others are refused. Pillow reads many more, some through other programs: EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION = 0x0112  # the tag, in Exif and in TIFF
_TURN = PIL.Image.Transpose
_TURNS = {  # by the tag's value; 1 is upright
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}
# Where Pillow keeps what it takes for an orientation.
_METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


class ImageError(errors.UserError):
    """An image cannot be read; the message says which and why."""


class TooLargeError(ImageError):
    """More bytes than MAX_BYTES, or more pixels than Pillow decodes."""


class Header(NamedTuple):
    """What is known of an image before its pixels are decoded."""

    size: tuple[int, int]  # width, height of what `decode_image` gives
    turned: bool  # whether the file has an orientation other than upright


def header(encoded: bytes, name: str = "image") -> Header:
    """The size of the image in `encoded`, and whether it is turned; arguments, errors: see `decode_image`."""
    image: Any = open_image(encoded, name)  # PIL's type has no tag_v2
    size = image.size
    if image.format == "TIFF":
        with _reading(name):
            number, *stored = (image.tag_v2.get(tag, 1) for tag in (_ORIENTATION, 256, 257))
        swap = size == tuple(stored)  # newer versions of Pillow have done it already
    else:
        if image.format == "PNG" and "exif" not in image.info and b"eXIf" in encoded:
            with _reading(name):
                image.load()  # it stands behind the pixels
        number, swap = _orientation(image), True
    if swap and number in (5, 6, 7, 8):
        size = size[1], size[0]
    return Header(size, number in _TURNS)


def open_image(encoded: bytes, name: str = "image") -> PIL.Image.Image:
    """The image in `encoded` with its mode, format and size in the file; pixels are not decoded yet.

    Args:
      encoded: a file of one of FORMATS; of several frames the first is taken.
      name: of the image, for errors.

    Raises:
      ImageError: not such a file, damaged, or too large.
    """
    _check_bytes(len(encoded), name)
    with _reading(name):
        try:
            image = PIL.Image.open(io.BytesIO(encoded), formats=FORMATS)
        except PIL.UnidentifiedImageError:
            raise ImageError(
                f"{name}: {len(encoded)} bytes that are no known image format, expected {_READABLE}"
            ) from None
        except PIL.Image.DecompressionBombError as error:
            raise TooLargeError(f"{name}: {error}") from None
    if any(
        tile[0] == "bmp_rle" for tile in image.tile
    ):  # Pillow makes up to 255 lines of four bytes, whatever the size
        raise TooLargeError(f"{name}: got a BMP with run lengths, expected one of plain pixels")
    for key in ("xmp", "XML:com.adobe.xmp"):  # Pillow would turn a TIFF by it
        image.info.pop(key, None)
    return image


def decode_image(encoded: bytes, name: str = "image", orientation: str = "exif") -> PIL.Image.Image:
    """The image in `encoded` (one of FORMATS), decoded, in its own mode; without EXIF and XMP.

    Args:
      encoded: as of `open_image`; and `name`.
      orientation: "exif" or "file", see above. An image that was turned has the format None.

    Raises:
      ImageError: as `open_image`; also truncated, or of floats or 32-bit integers, which have no fixed range.
    """
    image = open_image(encoded, name)
    with _reading(name):
        image.load()
    if image.mode in ("F", "I"):
        raise ImageError(f"{name}: {_NO_RANGE.format(image.mode)}")
    if orientation == "exif":
        image = upright(image)
    for key in _METADATA:
        image.info.pop(key, None)
    return image


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image as a viewer shows it: turned as its EXIF says, which the result does not have then.

    PIL keeps the EXIF of an image that is cropped, resized or converted; one made of an array has none.
    Raises what PIL raises if the pixels cannot be read.
    """
    image.load()  # may turn it, or find EXIF behind the pixels
    turn = _TURNS.get(_orientation(image))
    if turn is None:
        return image
    image = image.transpose(turn)
    del image.info["exif"]
    return image


def _orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation, from 1 (upright) to 8; 1 if there is none, or its block is damaged."""
    exif = image.info.get("exif")
    if not isinstance(exif, bytes):
        return 1
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "L", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for offset in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(order + "HHLH", exif, offset)
            if tag == _ORIENTATION:
                return value if (kind, values) == (3, 1) else 1  # one short number
    except struct.error:  # cut off
        pass
    return 1


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Inside, what PIL's readers raise (OSError, SyntaxError, struct.error and more) is an ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; the pixels alone count
            yield
    except ImageError:
        raise
    except Exception as error:
        said = str(getattr(error, "strerror", None) or error) or type(error).__name__
        raise ImageError(f"{name}: {said.splitlines()[0]}, expected a readable image") from None


def read_file(path: epath.PathLike, name: str | None = None) -> bytes:
    """The content of an image file, local or remote; `name` is its name in errors, by default the path.

    Raises:
      OSError: there is none, or it cannot be read.
      ImageError: not a regular file (a link to one is), or too long. Neither is opened.
    """
    path, name = epath.Path(path), name or str(path)
    length = regular_file.length(path)
    if length is None:
        raise ImageError(f"{name}: got a folder, pipe or device, expected an image file")
    _check_bytes(length, name)
    with path.open("rb") as file:
        return file.read(length)


def _check_bytes(length: int, name: str) -> None:
    if length > MAX_BYTES:
        raise TooLargeError(f"{name}: got {length:,} bytes, expected at most {MAX_BYTES:,}")


def load_image(path: epath.PathLike, orientation: str = "exif") -> PIL.Image.Image:
    """The image at `path` (local or remote), as `decode_image` gives it. Raises ImageError."""
    with _reading(str(path)):
        encoded = read_file(path)
    return decode_image(encoded, str(path), orientation)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image of any mode as RGB; of 16 bits the upper eight are taken, as in tf.data (PIL clips at 255).

    Raises:
      ImageError: mode F or I, whose numbers have no fixed range.
    """
    if image.mode.startswith("I;16"):
        return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        raise ImageError(_NO_RANGE.format(image.mode))
    if image.mode == "P":  # PIL warns where a palette with transparency becomes RGB at once
        image = image.convert("RGBA")
    return image.convert("RGB")


def resize(image: PIL.Image.Image | np.ndarray, size: int) -> np.ndarray:
    """Resizes an image to a square, without a crop; the aspect ratio is not kept.

    Equals torchvision's `Resize((size, size), BICUBIC)` on PIL images. Which of its two passes
    Pillow runs first differs between versions (13.0 from earlier ones), by a few levels at worst.

    DIFFERS: the reference resizes first and converts to RGB afterwards, which takes nearest neighbours for
    palette images and the hidden colours of transparent pixels. Here the conversion comes first; RGB and grey
    images are the same either way.

    Args:
      image: PIL image of any mode, or uint8 [H, W, 3] or [H, W].
      size: pixels of an edge of the square, S.

    Returns: uint8 [S, S, 3].

    Raises:
      ImageError: another array, or as `to_rgb`.
    """
    if not isinstance(image, PIL.Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            got = f"{image.dtype} {list(image.shape)}"
            raise ImageError(f"got an array {got}, expected uint8 [H, W, 3]")
        image = PIL.Image.fromarray(image)
    image = to_rgb(image)
    if image.size != (size, size):
        image = image.resize((size, size), PIL.Image.Resampling.BICUBIC)
    return np.asarray(image)
