"""An annotation as an example of the record set."""

import io
from typing import Any

import PIL.Image

from grain_jax.core import images
from grain_jax.core.annotations import Annotation
from grain_jax.data.arguments import Encoding

# What tf.data decodes to the same RGB pixels as PIL: (format, modes). The rest is stored as PNG.
_STORED_AS_THEY_ARE = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "L", "P", "1", "RGBA", "LA")}

TURNED = "are turned upright by their EXIF orientation, and boxes are of the upright pixels"


def encode(annotation: Annotation, image: PIL.Image.Image, encoding: Encoding) -> dict[str, Any]:
    """An annotation, with its boxes inside of its image, as features of data/SCHEMA.md without `id`."""
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

    `image` is as `images.decode_image` gives it: without a format if it was turned, so its file, `encoded`,
    cannot be kept.
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
