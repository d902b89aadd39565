"""Checks an image before a model sees it: one complete still image per file, with sides within limits.

Every fault has a cause of a fixed name, under which it is also counted.
"""

import PIL.Image
from grain_jax.data import sources
from grain_jax.data.annotate.options import Limits

from grain_jax.files import images

CAUSES = (
    "empty file",
    "unreadable",  # none of images.FORMATS
    "damaged",  # an image that begins well: truncated, or broken inside
    "animated",  # several frames
    "too small",
    "too large",
)


def check(item: sources.Image, limits: Limits) -> PIL.Image.Image | sources.Fault:
    """The image as RGB, whatever its colour mode (CMYK, palette, 16 bits, ...), or its fault."""
    if not item.encoded:
        return sources.Fault(item.image, "empty file", "got 0 bytes, expected an image")
    fault = _header_fault(item, limits)
    if fault:
        return fault
    try:
        image = images.decode_image(item.encoded, orientation=item.orientation)
    except images.ImageError as error:
        return sources.Fault(item.image, "damaged", str(error))
    return images.to_rgb(image)


def _header_fault(item: sources.Image, limits: Limits) -> sources.Fault | None:
    """The fault that the header of the file shows, before pixels are decoded."""
    try:
        header = images.open_image(item.encoded)
    except images.TooLargeError as error:
        return sources.Fault(item.image, "too large", str(error))
    except images.UnknownFormatError as error:
        return sources.Fault(item.image, "unreadable", str(error))
    except images.ImageError as error:
        return sources.Fault(item.image, "damaged", str(error))
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
    # Phones put a second image behind a JPEG (MPO): the first is the photograph.
    if header.format != "MPO" and getattr(header, "is_animated", False):
        detail = f"got several frames of {header.format}, expected one still image"
        return sources.Fault(item.image, "animated", detail)
    return None
