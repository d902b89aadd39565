"""Checks annotation lines together with their images; `grain_jax/files/annotations.py` checks lines alone.

A line becomes an `Annotation` or a list of faults, never an exception; `data/build.py` decides how
many faults end a build.
"""

import math
from typing import NamedTuple

import PIL.Image
from etils import epath

from grain_jax.files import annotations, images

# What becomes of images with an EXIF orientation other than upright, by the orientation that was asked for.
TURNED = {
    "exif": "are turned upright by their EXIF orientation, and boxes are of the upright pixels; --orientation file takes"
    " the pixels as they are stored",
    "file": "have an EXIF orientation that is not applied: boxes and training have the pixels as they are stored,"
    " viewers show them turned",
}


class Checked(NamedTuple):
    """The result of checking a line: an annotation with its image, or faults."""

    annotation: annotations.Annotation | None  # its boxes are clipped to the image
    image: PIL.Image.Image | None
    header: images.Header | None  # of an image that can be read
    encoded: bytes  # the image's file
    faults: list[str]
    boxes_clipped: int
    unknown_keys: list[str]


def check_line(
    line: bytes,
    folder: epath.PathLike,
    encoded_image: bytes | None = None,
    orientation: str = "exif",
) -> Checked:
    """Checks one line and its image: a file below `folder`, or `encoded_image`; orientation as of `decode_image`."""
    parsed = annotations.parse_line(line, caption_required=True)
    faults = list(parsed.faults)
    image, header, encoded = None, None, b""
    if parsed.image:
        image, header, encoded = _image(
            parsed.image, epath.Path(folder), encoded_image, orientation, faults
        )
    boxes_xyxy = [] if image is None else _clipped(parsed.boxes_xyxy, image, faults)
    if faults:
        return Checked(None, None, header, b"", faults, 0, parsed.unknown_keys)
    found = parsed.annotation
    regions = tuple(
        region._replace(box_xyxy=box_xyxy) for region, box_xyxy in zip(found.regions, boxes_xyxy)
    )
    changed = sum(old.box_xyxy != new.box_xyxy for old, new in zip(found.regions, regions))
    found = found._replace(regions=regions)
    return Checked(found, image, header, encoded, [], changed, parsed.unknown_keys)


def _image(
    name: str, folder: epath.Path, encoded: bytes | None, orientation: str, faults: list[str]
) -> tuple[PIL.Image.Image | None, images.Header | None, bytes]:
    got = f"image: got {annotations.show(name)}"
    try:
        if encoded is None:
            encoded = images.read_file(folder / name, got)
        image = images.decode_image(encoded, got, orientation)
        return image, images.header(encoded, got, orientation), encoded
    except FileNotFoundError:
        faults.append(f"{got}, expected a file; there is no {folder / name}")
    except OSError as error:
        faults.append(f"{got}, {error.strerror or error}, expected an image")
    except images.ImageError as error:
        faults.append(str(error))
    return None, None, b""


def _clipped(
    boxes_xyxy: list[annotations.Box | None], image: PIL.Image.Image, faults: list[str]
) -> list[annotations.Box | None]:
    """Each box clipped to the image; None, and a fault, for a box with too little area inside."""
    out = []
    for index, box_xyxy in enumerate(boxes_xyxy):
        if box_xyxy is None:  # its own fault is reported already
            out.append(None)
            continue
        clipped = annotations.clip_box(box_xyxy, *image.size)
        if clipped.box_xyxy is None:
            typed = [int(x) if x.is_integer() else x for x in box_xyxy]
            kept = math.floor(100 * clipped.kept)  # 49.9% is not said to be 50%
            faults.append(
                f"regions[{index}].box: got {annotations.show(typed)}, {kept}% of it"
                f" in the image of {image.width} x {image.height},"
                f" expected at least {annotations.MIN_INSIDE:.0%}"
            )
        out.append(clipped.box_xyxy)
    return out
