"""Which pictures a model is shown: one still picture a file, whole, and of a size that makes sense.

Everything that can be wrong with a file has a cause of a fixed name, which is also its counter's.
"""

import io
import warnings
from typing import NamedTuple

import PIL.Image

from data import sources
from grain_jax import images

CAUSES = (
    "empty file",
    "unreadable",  # no picture format that PIL knows
    "damaged",  # a picture that begins well: truncated, or broken inside
    "animated",  # several frames
    "too small",
    "too large",
)


class Limits(NamedTuple):
    """Pixels of a picture's edges. The upper one also keeps decompression bombs from being decoded."""

    min_side: int = 16
    max_side: int = 10_000


def check(item: sources.Picture, limits: Limits) -> PIL.Image.Image | sources.Fault:
    """The picture as RGB, whatever its colour mode (CMYK, palette, 16 bits, ...), or what is wrong.

    The orientation tag of cameras is not applied: boxes are in pixels of the file.
    """
    if not item.encoded:
        return sources.Fault(item.image, "empty file", "got 0 bytes, expected a picture")
    fault = _header_fault(item, limits)
    if fault:
        return fault
    try:
        picture = images.decode_image(item.encoded)
    except images.ImageError as error:
        return sources.Fault(item.image, "damaged", str(error))
    return images.to_rgb(picture)


def _header_fault(item: sources.Picture, limits: Limits) -> sources.Fault | None:
    """What is wrong with the file as far as its header tells, before its pixels take memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            header = PIL.Image.open(io.BytesIO(item.encoded))
    except PIL.Image.DecompressionBombError as error:
        return sources.Fault(item.image, "too large", str(error))
    except PIL.UnidentifiedImageError:
        detail = f"got {len(item.encoded)} bytes that are no known picture format"
        return sources.Fault(item.image, "unreadable", f"{detail}, expected a picture")
    except Exception as error:  # PIL's readers raise OSError, SyntaxError, struct.error and more
        return sources.Fault(item.image, "damaged", f"{type(error).__name__}: {error}")
    width, height = header.size
    if max(width, height) > limits.max_side:
        return sources.Fault(
            item.image,
            "too large",
            f"got {width} x {height} pixels, expected at most {limits.max_side} a side",
        )
    if min(width, height) < limits.min_side:
        return sources.Fault(
            item.image,
            "too small",
            f"got {width} x {height} pixels, expected at least {limits.min_side} a side",
        )
    try:
        # Phones put a second picture behind a JPEG (MPO): the first is the photograph.
        several = header.format != "MPO" and getattr(header, "is_animated", False)
        if several:
            detail = f"got {header.n_frames} frames of {header.format}, expected one still picture"
            return sources.Fault(item.image, "animated", detail)
    except Exception as error:  # counting frames reads on
        return sources.Fault(item.image, "damaged", f"{type(error).__name__}: {error}")
    return None
