"""An annotation line as an example of the record set; run by the build's worker processes."""

import io
from typing import Any, NamedTuple

import PIL.Image
from etils import epath
from grain_jax.data import annotations, duplicates
from grain_jax.data.arguments import Encoding

from grain_jax.files import annotations as lines
from grain_jax.files import images, regular_file

VERSION = "1.0.0"  # of the record format, and the folder that TFDS looks for

# What tf.data decodes to the same RGB pixels as PIL: (format, modes). The rest is stored as PNG.
_STORED_AS_THEY_ARE = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "L", "P", "1", "RGBA", "LA")}


class Line(NamedTuple):
    """A line of the annotation file, numbered from 1."""

    number: int
    text: bytes
    encoded_image: bytes | None = None  # where it is no file in the images' folder


class Verdict(NamedTuple):
    """The result of checking a line; small, since one is sent between processes for every line."""

    number: int
    faults: list[str]
    id: str | None
    image: str
    image_bytes: int
    regions: int
    negatives: int  # of all regions
    boxes_clipped: int
    turned: bool  # the image has an EXIF orientation other than upright
    unknown_keys: list[str]
    fingerprint: duplicates.Fingerprint | None  # None of a faulty line


def check(line: Line, *, folder: str, orientation: str = "exif") -> Verdict:
    """Checks a line and decodes its image, with `orientation` as of `decode_image`."""
    checked = annotations.check_line(line.text, folder, line.encoded_image, orientation)
    found = checked.annotation
    return Verdict(
        number=line.number,
        faults=checked.faults,
        id=found.id if found else None,
        image=found.image if found else "",
        image_bytes=len(checked.encoded),
        regions=len(found.regions) if found else 0,
        negatives=sum(len(region.negatives) for region in found.regions) if found else 0,
        boxes_clipped=checked.boxes_clipped,
        turned=checked.header is not None and checked.header.turned,
        unknown_keys=checked.unknown_keys,
        fingerprint=(duplicates.fingerprint(checked.encoded, checked.image) if found else None),
    )


class Encoded(NamedTuple):
    """A line, ready to be written."""

    features: dict[str, Any]  # see data/SCHEMA.md; `id` may be None
    stored_anew: bool  # its file is stored anew, since training cannot read it


def encode(
    line: Line, *, folder: str, encoding: Encoding, orientation: str = "exif"
) -> Encoded | list[str]:
    """The line as features, or its faults."""
    checked = annotations.check_line(line.text, folder, line.encoded_image, orientation)
    found, image = checked.annotation, checked.image
    if found is None:
        return checked.faults
    width, height = image.size
    stored, stored_anew = encode_image(image, checked.encoded, encoding)
    features = {
        "id": found.id,
        "image": stored,
        "captions": list(found.captions),
        "synthetic_caption": found.synthetic_caption,
        "regions": [
            {
                "bbox": (y1 / height, x1 / width, y2 / height, x2 / width),
                "description": region.description,
                "score": region.score,
                "negatives": list(region.negatives),
            }
            for region in found.regions
            for x1, y1, x2, y2 in [region.box_xyxy]
        ],
    }
    return Encoded(features, stored_anew)


def encode_image(image: PIL.Image.Image, encoded: bytes, encoding: Encoding) -> tuple[bytes, bool]:
    """The bytes to store. "original" keeps the file's own wherever its pixels need no change.

    Args:
      image: as `images.decode_image` gives it: without a format where it was turned, and the file's do not do.
      encoded: the file.
      encoding: how to store it.

    Returns: the bytes, and whether the file's own would have been kept, but training cannot read them.
    """
    fits = encoding.size in (0, image.width) and encoding.size in (0, image.height)
    stored_anew = False
    if encoding.kind == "original" and fits:
        if image.mode in _STORED_AS_THEY_ARE.get(image.format, ()):
            if _is_read_by_training(encoded, image.size):
                return encoded, False
            stored_anew = True
    if encoding.size:
        image = PIL.Image.fromarray(images.resize(image, encoding.size))
    if encoding.kind != "jpeg":
        return images.encode_png(image), stored_anew
    out = io.BytesIO()
    # Colours at full resolution: halved, they cost quality 95 nine decibels (docs/input.md).
    images.to_rgb(image).save(out, "JPEG", quality=encoding.quality, subsampling=0)
    return out.getvalue(), stored_anew


def _is_read_by_training(encoded: bytes, size: tuple[int, int]) -> bool:
    """Whether tf.io decodes the file to an image of that width and height: it refuses damage that PIL tolerates."""
    import tensorflow as tf  # slow to start, and of no use to those who only check

    from grain_jax.input_pipeline import transforms

    try:
        height, width, _ = transforms.decode(tf.constant(encoded)).shape
    except tf.errors.InvalidArgumentError:
        return False
    return (width, height) == size


def read_lines(path: epath.PathLike):
    """The lines of an annotation file that are not blank, one after another. Raises regular_file.FileError."""
    for number, text in enumerate(regular_file.lines(path, lines.EXPECTED), 1):
        if text.strip():
            yield Line(number, text)
