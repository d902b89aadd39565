"""Joins a reader's annotation with its image: the one place where texts and boxes of readers are checked.

A region that is empty or lies outside is left out with its cause; its image stays.
"""

from typing import Any

import PIL.Image
from etils import epath

from grain_jax.core import annotations, images, regular_file
from grain_jax.core.annotations import Annotation, Fault, Region
from grain_jax.data.sources import base


def load(annotation: Annotation, folder: epath.PathLike) -> Annotation | Fault:
    """The annotation with its image, which is a file below `folder`; its boxes are of the upright pixels."""
    path = regular_file.inside(annotation.image)
    if not path:
        expected = "expected a path below the images' folder"
        return Fault(annotation.image, "bad annotation", expected, annotation.where)
    file = epath.Path(folder) / path
    try:
        file = regular_file.named(folder, path)
        encoded = images.read_file(file)
    except FileNotFoundError:
        return Fault(path, "no such file", f"there is no {file}", annotation.where)
    except (OSError, ValueError) as error:  # also a name of half surrogates
        return _unreadable(path, error, annotation.where)
    return join(annotation._replace(image=path, encoded=encoded))


def join(annotation: Annotation) -> Annotation | Fault:
    """The annotation, checked with its image; regions that it cannot have are left out with their cause.

    An image without regions is not decoded here: later steps find its faults.
    """
    image, where = annotation.image, annotation.where
    if not annotation.encoded:
        return Fault(image, "empty file", "0 bytes, expected an image", where)
    if text(image) != image.strip():
        return Fault(image, "bad annotation", "expected a name in UTF-8", where)
    regions, left_out = [], [Fault(*fault) for fault in annotation.left_out]
    kept: dict[int, int] = {}  # position of a region in `found` -> in the result
    if annotation.regions:
        try:
            size = images.header(annotation.encoded, image).size
        except images.ImageError as error:
            return _unreadable(image, error, where)
        drawn_on = tuple(annotation.drawn_on or size)
        if None not in drawn_on and drawn_on not in (size, base.SHARES):
            expected = f"expected {drawn_on[0]} x {drawn_on[1]}, which its boxes were drawn on"
            got = f"got {size[0]} x {size[1]}, {expected}"
            return Fault(image, "another size", got, where)
        scale = size if drawn_on == base.SHARES else (1, 1)
        for position, values in enumerate(annotation.regions):
            region = _region(Region(*values), size, scale)
            if isinstance(region, Region):
                kept[position] = len(regions)
                regions.append(region)
            else:
                left_out.append(Fault(image, *region))
    phrases = annotation.phrases
    if phrases is not None:  # with their boxes that are kept, without those that have none
        phrases = (tuple(kept[x] for x in phrase if x in kept) for phrase in phrases)
        phrases = tuple(filter(None, phrases))
    return annotation._replace(
        captions=tuple(filter(None, map(text, annotation.captions))),
        synthetic_caption=text(annotation.synthetic_caption),
        regions=tuple(regions),
        left_out=tuple(left_out),
        phrases=phrases,
        drawn_on=None,
    )


def decode(item: Annotation | Fault) -> PIL.Image.Image | Fault:
    """The upright image of an annotation; a Fault, "too large" or "unreadable", if it has none."""
    if isinstance(item, Fault):
        return item
    try:
        return images.decode_image(item.encoded, item.image)
    except images.ImageError as error:
        return _unreadable(item.image, error, item.where)


def text(value: Any) -> str:
    """`value` without white space at its ends; "" if it is no text. Half surrogates are taken out."""
    return value.encode("utf-8", "ignore").decode().strip() if isinstance(value, str) else ""


def _unreadable(image: str, error: Exception, where: str) -> Fault:
    cause = "too large" if isinstance(error, images.TooLargeError) else "unreadable"
    reason = str(error)
    if not isinstance(error, images.ImageError):
        reason = f"{getattr(error, 'strerror', None) or error}, expected an image"
    return Fault(image, cause, reason, where)


def _region(values: Any, size: tuple[int, int], scale: tuple[int, int]) -> Region | tuple[str, str]:
    """The region, or (cause, detail)."""
    box, description, score, negatives = values
    got = f"got box {annotations.show(box)}"
    if fault := annotations.box_fault(box):
        return "bad box", f"{got}, {fault}"
    x1, y1, x2, y2 = (float(x) * by for x, by in zip(box, scale * 2))
    if annotations.clip_box((x1, y1, x2, y2), *size)[0] is None:
        inside = f"at least {annotations.MIN_INSIDE:.0%} of it in the image"
        return "bad box", f"{got}, expected {inside} of {size[0]} x {size[1]}"
    if not text(description):
        return "no description", f"{got} with {annotations.show(description)}, expected a text"
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        return "bad box", f"{got} with score {annotations.show(score)}, expected 0 to 1"
    # Neither the description nor each other, as A.jsonl wants them.
    kept = {annotations.plain(text(description)): ""}
    for negative in filter(None, map(text, negatives if isinstance(negatives, list | tuple) else ())):
        kept.setdefault(annotations.plain(negative), negative)
    return Region((x1, y1, x2, y2), text(description), float(score), tuple(filter(None, kept.values())))
