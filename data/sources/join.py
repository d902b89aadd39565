"""Joins the entry of an annotation file with its image.

Boxes are checked against the image here, since most public sets have a few that are empty or lie outside: such a
region is left out with its cause, and its image stays.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from grain_jax.data.sources.base import Entry, Fault, Image, text

from grain_jax.files import annotations, images, regular_file


def load(entry: Entry, folder: epath.PathLike, orientation: str = "exif") -> Image | Fault:
    """The entry with its image, which is a file below `folder`; its boxes are of the pixels in that orientation."""
    path = regular_file.inside(entry.image)
    if not path:
        return Fault(entry.image, "bad annotation", "expected a path below the images' folder")
    file = epath.Path(folder) / path
    try:
        encoded = images.read_file(file)
    except FileNotFoundError:
        return Fault(path, "no such file", f"there is no {file}")
    except images.TooLargeError as error:
        return Fault(path, "too large", str(error))
    except images.ImageError as error:
        return Fault(path, "unreadable", str(error))
    except (OSError, ValueError) as error:  # a name of half surrogates
        reason = getattr(error, "strerror", None) or error
        return Fault(path, "unreadable", f"{reason}, expected an image")
    return join(entry._replace(image=path), encoded, orientation)


def join(entry: Entry, encoded: bytes, orientation: str = "exif") -> Image | Fault:
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
            size = images.header(encoded, orientation=orientation).size
        except images.TooLargeError as error:
            return Fault(entry.image, "too large", str(error))
        except images.ImageError as error:
            return Fault(entry.image, "unreadable", str(error))
        if entry.size not in (None, size):
            expected = f"expected {entry.size[0]} x {entry.size[1]}, which its boxes were drawn on"
            other = "file" if orientation == "exif" else "exif"
            if images.header(encoded, orientation=other).size == entry.size:
                expected += f"; that is its size by --orientation {other}"
            return Fault(entry.image, "another size", f"got {size[0]} x {size[1]}, {expected}")
        for position, found in enumerate(entry.regions):
            region = _region(*found, size=size, shares=entry.shares)
            if isinstance(region, annotations.Region):
                place[position] = len(regions)
                regions.append(region)
            else:
                left_out.append(Fault(entry.image, *region))
    return Image(
        image=entry.image,
        encoded=encoded,
        captions=tuple(filter(None, map(text, entry.captions))),
        synthetic_caption=text(entry.synthetic_caption),
        regions=tuple(regions),
        id=entry.id,
        left_out=tuple(left_out),
        phrases=_kept_phrases(entry.phrases, place),
        orientation=orientation,
    )


def _kept_phrases(
    phrases: Sequence[Sequence[int]] | None, place: Mapping[int, int]
) -> tuple[tuple[int, ...], ...] | None:
    """The phrases with their boxes that are kept, `place` old position -> new; without those that have none."""
    if phrases is None:
        return None
    kept = (tuple(place[x] for x in phrase if x in place) for phrase in phrases)
    return tuple(filter(None, kept))


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
    if not (math.isfinite(x1) and all(map(math.isfinite, (y1, x2, y2)))):
        return "bad box", f"got {got}, expected four finite numbers"
    if not (x1 < x2 and y1 < y2):
        return "bad box", f"got {got}, expected x1 < x2 and y1 < y2"
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
    box_xyxy = x1, y1, x2, y2
    return annotations.Region(
        box_xyxy, text(description), float(score), _negatives(negatives, text(description))
    )


def _negatives(texts: Any, description: str) -> tuple[str, ...]:
    """The texts that can be negatives of the description: neither it nor each other, as A.jsonl wants them."""
    kept = {annotations.plain(description): ""}
    for one in texts if isinstance(texts, list | tuple) else ():
        if text(one):
            kept.setdefault(annotations.plain(text(one)), text(one))
    return tuple(filter(None, kept.values()))
