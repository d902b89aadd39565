"""An annotation line, checked together with its image, and as an example of the record set.

A line becomes an `Annotation` or a list of faults, never an exception; `data/build.py` decides how many faults end a
build. `grain_jax/core/annotations.py` checks lines alone. Run by the build's worker processes.
"""

import io
import math
from typing import Any, NamedTuple

import PIL.Image
from etils import epath

from grain_jax.core import annotations, errors, images, regular_file
from grain_jax.data import duplicates
from grain_jax.data.arguments import Encoding

VERSION = "1.0.0"  # of the record format, and the folder that TFDS looks for

# What tf.data decodes to the same RGB pixels as PIL: (format, modes). The rest is stored as PNG.
_STORED_AS_THEY_ARE = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "L", "P", "1", "RGBA", "LA")}


# How the name of a table ends -> the data source that reads it.
_TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

TURNED = "are turned upright by their EXIF orientation, and boxes are of the upright pixels"


class Line(NamedTuple):
    """A line of the annotation file, numbered from 1."""

    number: int
    text: bytes
    encoded_image: bytes | None = None  # where it is no file in the images' folder
    faults: tuple[str, ...] = ()  # for which a data source has no text here
    left_out: tuple[str, ...] = ()  # faults of regions that a data source has left out
    where: str = ""  # in messages: FILE:LINE, or the number of the image in its data source


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
) -> Checked:
    """Checks one line and its image: a file below `folder`, or `encoded_image`."""
    parsed = annotations.parse_line(line, text_required=True)
    faults = list(parsed.faults)
    image, header, encoded, boxes_xyxy = None, None, encoded_image, []
    if parsed.image:
        got = f"image: got {annotations.show(parsed.image)}"
        path = epath.Path(folder) / parsed.image
        try:
            path = regular_file.named(folder, parsed.image)
            encoded = images.read_file(path, got) if encoded is None else encoded
            image = images.decode_image(encoded, got)
            header = images.header(encoded, got)
            boxes_xyxy = _clipped(parsed.boxes_xyxy, image, faults)
        except FileNotFoundError:
            faults.append(f"{got}, expected a file; there is no {path}")
        except OSError as error:
            faults.append(f"{got}, {error.strerror or error}, expected an image")
        except images.ImageError as error:
            faults.append(str(error))
    if faults:
        return Checked(None, None, header, b"", faults, 0, parsed.unknown_keys)
    given = parsed.annotation.regions
    regions = tuple(old._replace(box_xyxy=new) for old, new in zip(given, boxes_xyxy, strict=True))
    changed = sum(old.box_xyxy != new.box_xyxy for old, new in zip(given, regions))
    found = parsed.annotation._replace(regions=regions)
    return Checked(found, image, header, encoded, [], changed, parsed.unknown_keys)


def _clipped(
    boxes_xyxy: list[annotations.Box | None], image: PIL.Image.Image, faults: list[str]
) -> list[annotations.Box | None]:
    """Each box clipped to the image; None, and a fault, for a box with too little area inside."""
    out = []
    for index, box_xyxy in enumerate(boxes_xyxy):
        clipped = box_xyxy and annotations.clip_box(box_xyxy, *image.size)  # None has its own fault
        if clipped and clipped.box_xyxy is None:
            typed = [int(x) if x.is_integer() else x for x in box_xyxy]
            kept = math.floor(100 * clipped.kept)  # 49.9% is not said to be 50%
            faults.append(
                f"regions[{index}].box: got {annotations.show(typed)}, {kept}% of it"
                f" in the image of {image.width} x {image.height},"
                f" expected at least {annotations.MIN_INSIDE:.0%}"
            )
        out.append(clipped and clipped.box_xyxy)
    return out


class Verdict(NamedTuple):
    """The result of checking a line, without its image: one is sent between processes for every line."""

    number: int
    annotation: annotations.Annotation | None  # None where there is a fault
    faults: list[str]
    image_bytes: int
    boxes_clipped: int
    turned: bool  # the image has an EXIF orientation other than upright
    unknown_keys: list[str]
    fingerprint: duplicates.Fingerprint | None  # None of a faulty line
    left_out: tuple[str, ...] = ()  # as of its line
    where: str = ""  # as of its line


def check(line: Line, *, folder: str) -> Verdict:
    """Checks a line and decodes its image."""
    if line.faults:
        faults = [*line.faults]
        return Verdict(line.number, None, faults, 0, 0, False, [], None, where=line.where)
    found = check_line(line.text, folder, line.encoded_image)
    good = found.annotation is not None
    return Verdict(
        number=line.number,
        annotation=found.annotation,
        faults=found.faults,
        image_bytes=len(found.encoded),
        boxes_clipped=found.boxes_clipped,
        turned=found.header is not None and found.header.turned,
        unknown_keys=found.unknown_keys,
        fingerprint=duplicates.fingerprint(found.encoded, found.image) if good else None,
        left_out=line.left_out,
        where=line.where,
    )


def encode(
    line: Line, *, folder: str, encoding: Encoding
) -> tuple[dict[str, Any], bool] | list[str]:
    """The line as features of data/SCHEMA.md (`id` may be None), and whether its image is stored anew; or its faults."""
    if line.faults:
        return [f"{line.where}: {fault}" for fault in line.faults]
    checked = check_line(line.text, folder, line.encoded_image)
    found, image = checked.annotation, checked.image
    if found is None:
        return [f"{line.where}: {fault}" for fault in checked.faults]
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
    return features, stored_anew


def encode_image(image: PIL.Image.Image, encoded: bytes, encoding: Encoding) -> tuple[bytes, bool]:
    """The bytes to store. "original" keeps the file's own wherever its pixels need no change.

    Args:
      image: as `images.decode_image` gives it: without a format where it was turned, and the file's do not do.
      encoded: the file.
      encoding: how to store it.

    Returns: the bytes, and whether the file's own would have been kept, but training cannot read them.
    """
    stored_anew = False
    fits = not encoding.size or image.size == (encoding.size, encoding.size)
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
    # Colours at full resolution: halved, they cost quality 95 nine decibels (docs/performance.md).
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


def count_lines(path: epath.Path) -> int:
    """The number of lines of an annotation file that are not blank.

    Raises errors.UserError: there are none, or the file is a table by its name; regular_file.FileError.
    """
    expected = f"expected {annotations.EXPECTED}"
    if source := _TABLES.get(path.suffix.lower()):
        advice = f"grain-jax build --source {source} makes records of it"
        raise errors.UserError(f"{path}: got a table, {expected}; {advice}")
    count = sum(1 for _ in read_lines(path))
    if not count:
        raise errors.UserError(f"{path}: the file is empty, {expected}")
    return count


def read_lines(path: epath.PathLike):
    """The lines of an annotation file that are not blank, one after another. Raises regular_file.FileError."""
    for number, text in enumerate(regular_file.lines(path, annotations.EXPECTED), 1):
        if text.strip():
            yield Line(number, text)
