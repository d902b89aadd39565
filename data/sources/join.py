"""Joins the entry of an annotation file with its image.

Boxes are checked against the image here, since most public sets have a few that are empty or lie outside: such a
region is left out with its cause, and its image stays.
"""

import math
from typing import Any

from etils import epath

from grain_jax.core import annotations, images, regular_file
from grain_jax.data.sources.base import Entry, Fault, Image, text


def load(entry: Entry, folder: epath.PathLike) -> Image | Fault:
    """The entry with its image, which is a file below `folder`; its boxes are of the upright pixels."""
    path = regular_file.inside(entry.image)
    if not path:
        return Fault(entry.image, "bad annotation", "expected a path below the images' folder")
    file = epath.Path(folder) / path
    try:
        file = regular_file.named(folder, path)
        encoded = images.read_file(file)
    except FileNotFoundError:
        return Fault(path, "no such file", f"there is no {file}")
    except (OSError, ValueError) as error:  # also a name of half surrogates
        return _unreadable(path, error)
    return join(entry._replace(image=path), encoded)


def join(entry: Entry, encoded: bytes) -> Image | Fault:
    """The entry with its image; boxes that the image cannot have are left out with their cause.

    An image without regions is not decoded here: later steps find its faults.
    """
    if not encoded:
        return Fault(entry.image, "empty file", "0 bytes, expected an image")
    if text(entry.image) != entry.image.strip():
        return Fault(entry.image, "bad annotation", "expected a name in UTF-8")
    regions, left_out = [], [Fault(entry.image, *fault) for fault in entry.left_out]
    place: dict[int, int] = {}  # position of a region in the entry -> in the image
    if entry.regions:
        try:
            size = images.header(encoded).size
        except images.ImageError as error:
            return _unreadable(entry.image, error)
        drawn_on = tuple(entry.size or size)
        if drawn_on != size:
            expected = f"expected {drawn_on[0]} x {drawn_on[1]}, which its boxes were drawn on"
            return Fault(entry.image, "another size", f"got {size[0]} x {size[1]}, {expected}")
        for position, found in enumerate(entry.regions):
            region = _region(*found, size=size, shares=entry.shares)
            if isinstance(region, annotations.Region):
                place[position] = len(regions)
                regions.append(region)
            else:
                left_out.append(Fault(entry.image, *region))
    phrases = entry.phrases
    if phrases is not None:  # with their boxes that are kept, without those that have none
        kept = (tuple(place[x] for x in phrase if x in place) for phrase in phrases)
        phrases = tuple(filter(None, kept))
    return Image(
        image=entry.image,
        encoded=encoded,
        captions=tuple(filter(None, map(text, entry.captions))),
        synthetic_caption=text(entry.synthetic_caption),
        regions=tuple(regions),
        id=entry.id,
        left_out=tuple(left_out),
        phrases=phrases,
    )


def _unreadable(image: str, error: Exception) -> Fault:
    cause = "too large" if isinstance(error, images.TooLargeError) else "unreadable"
    if isinstance(error, images.ImageError):
        return Fault(image, cause, str(error))
    return Fault(image, cause, f"{getattr(error, 'strerror', None) or error}, expected an image")


def _region(
    box: Any,
    description: Any,
    score: Any,
    negatives: Any = (),
    *,
    size: tuple[int, int],
    shares: bool,
) -> annotations.Region | tuple[str, str]:
    """The region, or (cause, detail)."""
    got = f"box {annotations.show(box)}"
    try:
        x1, y1, x2, y2 = map(float, box)
    except (TypeError, ValueError, OverflowError):
        x1 = math.nan
    if not (math.isfinite(x1) and all(map(math.isfinite, (y1, x2, y2))) and x1 < x2 and y1 < y2):
        return "bad box", f"got {got}, expected four finite numbers, x1 < x2 and y1 < y2"
    width, height = size
    if shares:
        x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
    if annotations.clip_box((x1, y1, x2, y2), width, height).box_xyxy is None:
        inside = f"at least {annotations.MIN_INSIDE:.0%} of it in the image"
        return "bad box", f"got {got}, expected {inside} of {width} x {height}"
    if not text(description):
        return "no description", f"got {annotations.show(description)} at {got}, expected a text"
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        return "bad box", f"got score {annotations.show(score)} at {got}, expected 0 to 1"
    # Neither the description nor each other, as A.jsonl wants them.
    kept = {annotations.plain(text(description)): ""}
    for one in filter(None, map(text, negatives if isinstance(negatives, list | tuple) else ())):
        kept.setdefault(annotations.plain(one), one)
    negatives = tuple(filter(None, kept.values()))
    return annotations.Region((x1, y1, x2, y2), text(description), float(score), negatives)
