"""What every source speaks: images, faults, shards, options; and how an image's file meets its regions.

Boxes are checked against the image here, since most public sets have a few that are empty or lie
outside: such a region is left out by name, and its image stays.
"""

import itertools
import json
import math
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from grain_jax import errors
from grain_jax.files import annotations, images

CAUSES = (
    "no such file",
    "empty file",
    "unreadable",  # as a file, or no image in it
    "too large",  # beyond a bound of grain_jax/files/image_bounds.py
    "another size",  # than the one that the boxes were drawn on
    "no picture",  # a sample of a tar without one
    "damaged shard",  # a tar that ends early; what came before is kept
    "bad annotation",
    "bad box",  # of one region, which is left out
    "no description",  # of one region, which is left out
    "crowd",  # COCO's box around many; left out
)
"""Every cause that a source gives; the pipeline adds those of its checks and of its models."""

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
WHOLE = 1.0  # the score of regions that people drew: the formats have none
_CHUNK = 1 << 20  # characters of a long JSON list that are read at once
_BETWEEN = re.compile(r"[\s,]*")  # items of such a list


class SourceError(errors.UserError):
    """The source is not as its reader expects; the message is one line."""


class Options(NamedTuple):
    """Where a source is; plain values, so that they go to workers."""

    images: str  # folder of the images, of tar files, or of a TFDS set
    annotations: tuple[str, ...] = ()  # the files (or folders) that the source's reader names
    split: str = ""  # of sources that have splits; "" is all of them (TFDS: train)
    scratch: str = ""  # folder for the lists of images that workers read
    shard_size: int = 1000  # images a shard, where the source has no shards of its own


class Fault(NamedTuple):
    """Why an image, or one region of an image, is left out."""

    image: str  # as Picture.image; where there is none, what stands in its place (FILE:LINE, a tar)
    cause: str  # one of a fixed set of words: counters have these names
    detail: str  # what was got, what expected


class Picture(NamedTuple):
    """An image with what its source says about it."""

    image: str  # path below the images' folder, with /; unique in the source and stable over runs
    encoded: bytes  # the file as it is
    captions: tuple[str, ...] = ()
    synthetic_caption: str = ""
    regions: tuple[
        annotations.Region, ...
    ] = ()  # pixels of the file; may hang over its edge a little
    id: str | None = None
    left_out: tuple[Fault, ...] = ()  # regions that the source has and that cannot be used
    phrases: tuple[tuple[int, ...], ...] | None = None  # as annotations.Annotation.phrases


class Shard(NamedTuple):
    """Some images of a source: the unit of work, and of what is done again after a kill."""

    name: str  # safe in a file name, unique; shards sort by it. Lists with another content have another
    source: str
    arguments: Mapping[str, str | int]


class Entry(NamedTuple):
    """What an annotation file says of an image, before the image is seen."""

    image: str
    captions: Sequence[str] = ()
    synthetic_caption: str = ""
    regions: Sequence[tuple[Any, Any, Any]] = ()  # (xyxy box, description, score), unchecked
    shares: bool = False  # boxes are shares of width and height, not pixels
    size: tuple[int, int] | None = None  # width, height that the boxes were drawn on, where known
    id: str | None = None
    left_out: Sequence[tuple[str, str]] = ()  # (cause, detail) of regions
    phrases: Sequence[Sequence[int]] | None = None  # as annotations.Annotation.phrases


def text(value: Any) -> str:
    """`value` without white space at its ends; "" where it is no text. Half surrogates are taken out."""
    return value.encode("utf-8", "ignore").decode().strip() if isinstance(value, str) else ""


def xywh(box: Any) -> Any:
    """COCO's (left, top, width, height) as (x1, y1, x2, y2); what is no such box stays as it is."""
    try:
        left, top, width, height = map(float, box)
        return left, top, left + width, top + height
    except (TypeError, ValueError):
        return box


def taking_turns(groups: Iterable[Iterable[Any]]) -> Iterator[Any]:
    """The first of each group, then the second of each, ...

    Where a box has several descriptions, regions stand in this order: training keeps the first few
    of those that score the same, which then are of different boxes.
    """
    turns = itertools.zip_longest(*groups)
    return (item for turn in turns for item in turn if item is not None)


def load(entry: Entry, folder: epath.PathLike) -> Picture | Fault:
    """The entry with its image, which is a file below `folder`."""
    path = posixpath.normpath(entry.image)
    if posixpath.isabs(path) or path.split("/")[0] == ".." or "\0" in path:
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
    except OSError as error:
        return Fault(path, "unreadable", f"{error.strerror or error}, expected an image")
    return join(entry._replace(image=path), encoded)


def join(entry: Entry, encoded: bytes) -> Picture | Fault:
    """The entry with its image; boxes that cannot be are left out by name.

    An image without regions is not looked at: whoever decodes it finds what is wrong with it.
    """
    if not encoded:
        return Fault(entry.image, "empty file", "0 bytes, expected a picture")
    if text(entry.image) != entry.image.strip():
        return Fault(entry.image, "bad annotation", "expected a name in UTF-8")
    regions, left_out = [], [Fault(entry.image, *fault) for fault in entry.left_out]
    place: dict[int, int] = {}  # position of a region in the entry -> in the image
    if entry.regions:
        try:
            size = images.open_image(encoded).size
        except images.TooLargeError as error:
            return Fault(entry.image, "too large", str(error))
        except images.ImageError as error:
            return Fault(entry.image, "unreadable", str(error))
        if entry.size not in (None, size):
            expected = f"expected {entry.size[0]} x {entry.size[1]}, which its boxes were drawn on"
            return Fault(entry.image, "another size", f"got {size[0]} x {size[1]}, {expected}")
        for position, found in enumerate(entry.regions):
            region = _region(*found, size=size, shares=entry.shares)
            if isinstance(region, annotations.Region):
                place[position] = len(regions)
                regions.append(region)
            else:
                left_out.append(Fault(entry.image, *region))
    return Picture(
        image=entry.image,
        encoded=encoded,
        captions=tuple(filter(None, map(text, entry.captions))),
        synthetic_caption=text(entry.synthetic_caption),
        regions=tuple(regions),
        id=entry.id,
        left_out=tuple(left_out),
        phrases=_kept_phrases(entry.phrases, place),
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
    box: Any, description: Any, score: Any, *, size: tuple[int, int], shares: bool
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
    return annotations.Region((x1, y1, x2, y2), text(description), float(score))


def read_json(path: epath.PathLike, *, expected: str) -> Any:
    """The JSON value in a file. Raises SourceError."""
    path = epath.Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}, expected {expected}") from None
    except ValueError as error:
        raise SourceError(f"{path}: not JSON ({error}), expected {expected}") from None


def read_json_list(path: epath.PathLike, *, expected: str) -> Iterator[dict[str, Any]]:
    """The objects of a file that holds one JSON list, one at a time: such files have gigabytes.

    Raises SourceError.
    """
    path, decoder = epath.Path(path), json.JSONDecoder()
    if not path.exists() or path.is_dir():
        raise SourceError(f"{path}: no such file, expected {expected}")
    with path.open("r", encoding="utf-8") as file:

        def read() -> str:
            try:
                return file.read(_CHUNK)
            except UnicodeDecodeError:
                raise SourceError(f"{path}: not UTF-8 text, expected {expected}") from None

        buffer, at = read().lstrip(), 1
        if buffer[:1] != "[":
            raise SourceError(f"{path}: got {buffer[:20]!r}, expected {expected}")
        while True:
            at = _BETWEEN.match(buffer, at).end()
            if buffer[at : at + 1] == "]":
                return
            try:
                item, at = decoder.raw_decode(buffer, at)
            except ValueError as error:  # it ends in what is not read yet, or it is broken
                more = read()
                if not more:
                    reason = f"not a JSON list ({error.msg}), expected {expected}"
                    raise SourceError(f"{path}: {reason}") from None
                buffer, at = buffer[at:] + more, 0
                continue
            if not isinstance(item, dict):
                got = annotations.show(item)
                raise SourceError(f"{path}: got {got} in the list, expected {expected}")
            yield item
