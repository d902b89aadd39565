"""Checks an image before a model sees it: one complete still image per file, with sides within limits."""

import PIL.Image

from grain_jax.core import images
from grain_jax.data import sources
from grain_jax.data.annotate.arguments import Annotate


def check(item: sources.Image, args: Annotate) -> PIL.Image.Image | sources.Fault:
    """The image as RGB, whatever its colour mode (CMYK, palette, 16 bits, ...), or its fault.

    Causes: "empty file", "unreadable" (none of images.FORMATS), "damaged" (truncated or broken inside), "animated".
    Beyond the limits of the command: "too small", "too large".
    """
    if not item.encoded:
        return sources.Fault(item.image, "empty file", "got 0 bytes, expected an image")
    try:
        header = images.open_image(item.encoded)
        width, height = header.size
        sides = f"got {width} x {height} pixels, expected at"
        if max(width, height) > args.max_side:
            cause, detail = "too large", f"{sides} most {args.max_side} a side"
        elif min(width, height) < args.min_side:
            cause, detail = "too small", f"{sides} least {args.min_side} a side"
        # Phones put a second image behind a JPEG (MPO): the first is the photograph.
        elif header.format != "MPO" and getattr(header, "is_animated", False):
            cause, detail = "animated", f"got several frames of {header.format}, expected one"
        else:
            return images.to_rgb(images.decode_image(item.encoded))
    except images.TooLargeError as error:
        cause, detail = "too large", str(error)
    except images.UnknownFormatError as error:
        cause, detail = "unreadable", str(error)
    except images.ImageError as error:
        cause, detail = "damaged", str(error)
    return sources.Fault(item.image, cause, detail)
