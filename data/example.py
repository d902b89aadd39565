"""An annotation, checked together with its image, and as an example of the record set.

Bad annotations give faults and raise no exception; `data/build.py` decides how many faults end a build.
`grain_jax/core/annotations.py` checks lines without their image.
"""

import io
import math
import operator
from typing import Any, NamedTuple

import PIL.Image
from etils import epath

from grain_jax.core import annotations, images
from grain_jax.core.annotations import Annotation, Fault
from grain_jax.data.arguments import Encoding
from grain_jax.data.sources import join

# What tf.data decodes to the same RGB pixels as PIL: (format, modes). The rest is stored as PNG.
_STORED_AS_THEY_ARE = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "L", "P", "1", "RGBA", "LA")}

TURNED = "are turned upright by their EXIF orientation, and boxes are of the upright pixels"


class Checked(NamedTuple):
    """An annotation whose boxes are clipped to its image, or faults."""

    annotation: Annotation | None  # None if there is a fault
    image: PIL.Image.Image | None
    faults: list[str]
    turned: bool = False  # the image has an EXIF orientation other than upright
    boxes_clipped: int = 0
    unknown_keys: tuple[str, ...] = ()


def check_line(line: bytes, folder: epath.PathLike, *, shares: bool = False) -> Checked:
    """Checks a line of A.jsonl, with boxes in pixels or `shares`, and its image, a file below `folder`."""
    parsed = annotations.parse_line(line, text_required=True)
    item = join.load(Annotation(parsed.image), folder) if parsed.image else None
    return _check(parsed, item, shares)


def check(item: Annotation) -> Checked:
    """Checks the annotation of a data source, which has its image."""
    faults = []
    if not (item.captions or item.synthetic_caption or item.regions):
        faults.append(annotations.NO_TEXT)
    boxes_xyxy = [region.box_xyxy for region in item.regions]
    return _check(annotations.Parsed(item, faults, [], item.image, boxes_xyxy), item)


def _check(parsed: annotations.Parsed, item: Annotation | Fault | None, shares: bool = False) -> Checked:
    """Checks what a line says with its image; `item` has the image or its fault, None without a name."""
    faults, unknown = list(parsed.faults), tuple(parsed.unknown_keys)
    image, turned, boxes_xyxy = item and join.decode(item), False, []
    if isinstance(image, Fault):
        detail = image.detail.removeprefix(f"{parsed.image}: ")
        faults.append(f"image: got {annotations.show(parsed.image)}, {detail}")
    elif image is not None:
        turned = images.header(item.encoded).turned
        scale = 2 * (image.size if shares else (1, 1))
        boxes_xyxy = [box and tuple(map(operator.mul, box, scale)) for box in parsed.boxes_xyxy]
        boxes_xyxy = _clipped(boxes_xyxy, image, faults)
    if faults:
        return Checked(None, None, faults, turned, unknown_keys=unknown)
    before = parsed.annotation.regions
    regions = tuple(old._replace(box_xyxy=new) for old, new in zip(before, boxes_xyxy, strict=True))
    clipped = sum(old.box_xyxy != new.box_xyxy for old, new in zip(before, regions))
    checked = parsed.annotation._replace(regions=regions, encoded=item.encoded)
    return Checked(checked, image, [], turned, clipped, unknown)


def _clipped(
    boxes_xyxy: list[annotations.Box | None], image: PIL.Image.Image, faults: list[str]
) -> list[annotations.Box | None]:
    """Each box clipped to the image; None, and a fault, for a box with too little area inside."""
    out = []
    for index, box_xyxy in enumerate(boxes_xyxy):
        box, share = None, 1.0  # None has its own fault
        if box_xyxy:
            box, share = annotations.clip_box(box_xyxy, *image.size)
        if box_xyxy and box is None:
            typed = [int(x) if x.is_integer() else x for x in box_xyxy]
            kept = math.floor(100 * share)  # so that 49.9% is not shown as 50%
            faults.append(
                f"regions[{index}].box: got {annotations.show(typed)}, {kept}% of it"
                f" in the image of {image.width} x {image.height},"
                f" expected at least {annotations.MIN_INSIDE:.0%}"
            )
        out.append(box)
    return out


def encode(checked: Checked, encoding: Encoding) -> dict[str, Any]:
    """A checked annotation as features of data/SCHEMA.md without `id`."""
    annotation, image = checked.annotation, checked.image
    width, height = image.size
    return {
        "image": encode_image(image, annotation.encoded, encoding),
        "captions": list(annotation.captions),
        "synthetic_caption": annotation.synthetic_caption,
        "regions": [
            {
                "bbox": (y1 / height, x1 / width, y2 / height, x2 / width),
                "description": region.description,
                "score": region.score,
                "negatives": list(region.negatives),
            }
            for region in annotation.regions
            for x1, y1, x2, y2 in [region.box_xyxy]
        ],
    }


def encode_image(image: PIL.Image.Image, encoded: bytes, encoding: Encoding) -> bytes:
    """The bytes to store. "original" keeps the file if its pixels need no change and training can read it.

    Args:
      image: as `images.decode_image` gives it; without a format if it was turned, so the file cannot be kept.
      encoded: the file.
      encoding: how to store it.
    """
    fits = not encoding.size or image.size == (encoding.size, encoding.size)
    same_pixels = fits and image.mode in _STORED_AS_THEY_ARE.get(image.format, ())
    if encoding.kind == "original" and same_pixels and _is_read_by_training(encoded, image.size):
        return encoded
    if encoding.size:
        image = PIL.Image.fromarray(images.resize(image, encoding.size))
    options: dict[str, Any] = {"format": "PNG"}
    if encoding.kind == "jpeg":
        # Colours at full resolution: halved, they cost quality 95 nine decibels (docs/performance.md).
        options = dict(format="JPEG", quality=encoding.quality, subsampling=0)
    out = io.BytesIO()
    images.to_rgb(image).save(out, **options)
    return out.getvalue()


def _is_read_by_training(encoded: bytes, size: tuple[int, int]) -> bool:
    """Whether tf.io decodes the file to that width and height: it refuses damage that PIL tolerates."""
    import tensorflow as tf  # slow to start

    from grain_jax.input_pipeline import transforms

    try:
        height, width, _ = transforms.decode(tf.constant(encoded)).shape
    except tf.errors.InvalidArgumentError:
        return False
    return (width, height) == size
