"""The protocol of a data source, `Source`, and the types that it takes and yields.

A source reads one format. `grain-jax annotate` finds it by its name in `data/sources/__init__.py`, or as `module:Class`:
a class of your own, in any module that Python finds (examples/source/csv_boxes.py). Its options are the fields of
the class, a dataclass; `--option KEY=VALUE` sets one.

Where the images are files and the annotations one file or a few, subclass `data.sources.staged.ListedSource` and
write `entries` alone. Where images come out of larger files, `read` gives each one's Entry and bytes to
`data.sources.join.join`.
"""

import hashlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from grain_jax.core import annotations, errors

CAUSES = (
    "no such file",
    "empty file",
    "unreadable",  # as a file, or no image in it
    "too large",  # beyond a bound of grain_jax/core/image_bounds.py
    "another size",  # than the one that the boxes were drawn on
    "no picture",  # a sample of a tar without an image
    "damaged shard",  # a tar that ends early; what came before is kept
    "bad annotation",
    "bad box",  # of one region, which is left out
    "no description",  # of one region, which is left out
    "crowd",  # COCO's box around many; left out
)
"""Every cause that a source gives; the pipeline adds those of its checks and of its models."""

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
Id = int | str  # of public formats
Scalar = bool | int | float | str | None
Box = list[Scalar] | None  # in a file: `join` leaves a wrong one out, and its image stays
WHOLE = 1.0  # the score of regions that people drew: the formats have none


class SourceError(errors.UserError):
    """The source is not as its reader expects; the message is one line."""


class Options(NamedTuple):
    """The options that every source gets: flags of `grain-jax annotate`. Plain values, so that they can be sent to workers."""

    images: str  # folder of the images, of tar files, or of a TFDS set
    annotations: tuple[str, ...] = ()  # the files (or folders) that the source's reader names
    split: str = ""  # of sources that have splits; "" is all of them (TFDS: train)
    scratch: str = ""  # folder for the lists of images that workers read
    shard_size: int = 1000  # images a shard, where the source has no shards of its own
    label_text: str = ""  # of a label, in the place of {}; "": the label alone

    def described(self, label: str) -> str:
        """The description that stands for a label: a name of a class."""
        named = label.strip() and self.label_text
        return self.label_text.replace("{}", label) if named else label


class Fault(NamedTuple):
    """Why an image, or one region of an image, is left out."""

    image: str  # as Image.image; where there is none, what stands in its place (FILE:LINE, a tar)
    cause: str  # one of CAUSES: counters have these names
    detail: str  # what was got, what expected
    where: str = ""  # FILE:LINE that says so, in formats that have lines


class Image(NamedTuple):
    """An image with what its source says about it."""

    image: str  # path below the images' folder, with /; unique in the source and stable over runs
    encoded: bytes  # the file as it is
    captions: tuple[str, ...] = ()
    synthetic_caption: str = ""
    # Pixels of the upright image; a box may hang over its edge a little.
    regions: tuple[annotations.Region, ...] = ()
    id: str | None = None
    left_out: tuple[Fault, ...] = ()  # regions that the source has and that cannot be used
    phrases: tuple[tuple[int, ...], ...] | None = None  # as annotations.Annotation.phrases
    where: str = ""  # as Fault.where


class SourceShard(NamedTuple):
    """Some images of a source: the unit of work, and of what a restarted job repeats."""

    name: str  # safe in a file name, unique; shards sort by it. Other content gets another name
    arguments: Mapping[str, Any]  # all that `read` needs, as plain values that JSON keeps
    source: str = ""  # its name; set by `data.sources.shards`, as is:
    options: Mapping[str, str] = {}  # the source's own, as texts


class Source(Protocol):
    """A reader of one format, as a class that is made from its own options alone.

    The machine that starts a job asks one instance for `shards`; each worker makes another one and `read`s. Workers
    share no memory, so all that `read` needs stands in the shard or in the source's options.
    """

    images_are_files: ClassVar[bool]  # below `Options.images`; False: they come out of larger files
    # A class may say `has_labels = True`: its regions have labels, of which it takes `Options.described`. One that can
    # do without `Options.images` says `needs_images = False`.

    def shards(self, options: Options) -> list[SourceShard]:
        """The source in pieces, in order; the same again as long as its files are the same.

        Raises:
          SourceError: the files are not as expected.
        """
        ...

    def read(self, shard: SourceShard) -> Iterator[Image | Fault]:
        """The images of a piece in order, and a fault for each one that cannot be used; needs no other piece."""
        ...


class Entry(NamedTuple):
    """What an annotation file says of an image, before the image is seen."""

    image: str
    captions: Sequence[str] = ()
    synthetic_caption: str = ""
    # (xyxy box, description, score) and, where the source has them, the negatives; unchecked.
    regions: Sequence[tuple[Any, ...]] = ()
    shares: bool = False  # boxes are shares of width and height, not pixels
    size: Sequence[float] | None = None  # width, height that the boxes were drawn on, where known
    id: str | None = None
    left_out: Sequence[tuple[str, str]] = ()  # (cause, detail) of regions
    phrases: Sequence[Sequence[int]] | None = None  # as annotations.Annotation.phrases
    where: str = ""  # as Fault.where


def shard_name(number: int, content: bytes) -> str:
    """The name of a shard that lists `content`: another content is not taken for a shard that is finished."""
    return f"{number:06d}-{hashlib.sha256(content).hexdigest()[:8]}"


def check_split(path: object, split: str, known: Iterable[str]) -> None:
    """Raises SourceError where the file at `path` has no such split; "" is all of them."""
    if split and split not in known:
        options = ", ".join(sorted(known))
        raise SourceError(f"{path}: got --split {split}, expected one of: {options}")


def text(value: Any) -> str:
    """`value` without white space at its ends; "" where it is no text. Half surrogates are taken out."""
    return value.encode("utf-8", "ignore").decode().strip() if isinstance(value, str) else ""


def size(width: float | None, height: float | None) -> tuple[float, float] | None:
    """(width, height); None where one of them is not known."""
    return None if width is None or height is None else (width, height)


def xywh(box: Any) -> Any:
    """COCO's (left, top, width, height) as (x1, y1, x2, y2); any other value is returned unchanged."""
    try:
        left, top, width, height = map(float, box)
        return left, top, left + width, top + height
    except (TypeError, ValueError, OverflowError):
        return box


def taking_turns(groups: Iterable[Iterable[Any]]) -> Iterator[Any]:
    """The first of each group, then the second of each, ...

    Where a box has several descriptions, regions stand in this order: training keeps the first few
    of those that score the same, which then are of different boxes.
    """
    turns = ((turn, item) for group in groups for turn, item in enumerate(group))
    return (item for _, item in sorted(turns, key=operator.itemgetter(0)))
