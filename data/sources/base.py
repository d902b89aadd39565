"""The protocol of a data source, `Source`, and what readers of public formats share.

To write one, subclass `data.sources.staged.ListedSource`. If images come out of larger files, write `shards`
and `read`, which gives each annotation with its image to `data.sources.join.join`.
"""

import dataclasses
import hashlib
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from grain_jax.core import errors
from grain_jax.core.annotations import Annotation, Fault, Region

CAUSES = (
    "no such file",
    "empty file",
    "unreadable",  # as a file, or no image in it
    "too large",  # images.TooLargeError
    "another size",  # than the one that the boxes were drawn on
    "no image",  # a sample of a tar without an image
    "damaged shard",  # a tar that ends early; what came before is kept
    "bad annotation",
    "bad box",  # of one region, which is left out
    "no description",  # of one region, which is left out
    "crowd",  # COCO's box around many; left out
)
"""Every cause that a source gives; annotation adds those of its checks and models."""

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_FILE = 4 << 30  # bytes of a JSON file; LVIS has 1.1 GB
MAX_NAME = 1024  # bytes of an image's name
MAX_PART = 240  # bytes of a part of it: file systems take 255, with the ending of a file in work
MAX_TEXT = 1 << 20  # bytes of a text or a JSON
T = TypeVar("T")
Id = int | str  # of public formats
Scalar = bool | int | float | str | None
Box = list[Scalar] | None  # in a file: `join` leaves a wrong one out, and its image stays
WHOLE = 1.0  # the score of regions that people drew: the formats have none
SHARES = (1, 1)  # Annotation.drawn_on, if boxes are shares of width and height
# Such boxes overhang a little; no file has all its boxes in the first pixels of its images.
LARGEST_SHARE = 1.5
ALL_SHARES = "boxes that all lie in [0, 1], as shares of width and height do"
AS_SHARES = "--option unit=share of grain-jax build reads them"

__all__ = ["Annotation", "Fault", "Options", "Region", "Source", "SourceError", "SourceShard"]


class SourceError(errors.UserError):
    """The source is not as its reader expects; the message is one line."""


class Options(NamedTuple):
    """The options that every source gets; plain values, so that they can be sent to workers."""

    images: str  # folder of the images, of tar files, or of a TFDS set
    annotations: tuple[str, ...] = ()  # the files (or folders) that the source's reader names
    split: str = ""  # of sources that have splits; "" is all of them (TFDS: train)
    scratch: str = ""  # folder for the lists of images that workers read
    shard_size: int = 1000  # images per shard, if the source has no shards of its own
    label_text: str = ""  # with {} for the label; "": the label alone

    def described(self, label: str) -> str:
        """The description that stands for a label: a name of a class."""
        named = label.strip() and self.label_text
        return self.label_text.replace("{}", label) if named else label


class SourceShard(NamedTuple):
    """Some images of a source: the unit of work, and of what a restarted job repeats."""

    name: str  # safe in a file name, unique; shards sort by it. Other content gets another name
    arguments: Mapping[str, Any]  # all that `read` needs, as plain values that JSON keeps
    source: str = ""  # its name; set by `data.sources.shards`, as is:
    options: Mapping[str, str] = {}  # the source's own, as texts


@dataclasses.dataclass(frozen=True)
class BoxUnit:
    """The option of a source whose boxes may be in pixels, or in shares of the image's width and height."""

    unit: Literal["pixel", "share"] = "pixel"

    @property
    def drawn_on(self) -> tuple[int, int] | None:
        """As `Annotation.drawn_on`; None for pixels."""
        return SHARES if self.unit == "share" else None


class Source(Protocol):
    """A reader of one format, as a class that is made from its own options alone: fields of a dataclass.

    The machine that starts a job asks one instance for `shards`; each worker makes another one and `read`s.
    Workers share no memory, so all that `read` needs stands in the shard or in the source's options.
    """

    images_are_files: ClassVar[bool]  # below `Options.images`; False: they come out of larger files
    # `needs_images = False`: the source can do without `Options.images`.

    def shards(self, options: Options) -> list[SourceShard]:
        """The pieces, in order; the same again as long as the files are the same. Raises SourceError."""

    def read(self, shard: SourceShard) -> Iterator[Annotation | Fault]:
        """The images of a piece in order, and a fault for each that cannot be used; needs no other piece."""


def shard_name(number: int, content: bytes) -> str:
    """The name of a shard that lists `content`: other content is not taken for a shard that is done."""
    return f"{number:06d}-{hashlib.sha256(content).hexdigest()[:8]}"


def check_split(path: object, split: str, known: Iterable[str]) -> None:
    """Raises SourceError if the file at `path` has no such split; "" is all of them."""
    if split and split not in known:
        options = ", ".join(sorted(known)) or "none"
        raise SourceError(f"{path}: got --split {split}, expected one of: {options}")


def items(
    values: Iterable[msgspec.Raw], kind: type[T], where: str, faults: list[Fault]
) -> Iterator[tuple[str, T]]:
    """(WHERE[NUMBER], item) of a list in a JSON file; items in another form become `faults`."""
    for number, value in enumerate(values):
        position = f"{where}[{number}]"
        try:
            yield position, msgspec.json.decode(value, type=kind)
        except (ValueError, RecursionError) as error:
            faults.append(Fault(position, "bad annotation", str(error), position))


def xywh(box: Any) -> Any:
    """COCO's (left, top, width, height) as (x1, y1, x2, y2); any other value is returned unchanged."""
    try:
        left, top, width, height = map(float, box)
        return left, top, left + width, top + height
    except (TypeError, ValueError, OverflowError):
        return box


def taking_turns(groups: Iterable[Iterable[Any]]) -> Iterator[Any]:
    """The first of each group, then the second of each: regions of boxes that have several descriptions.

    Training keeps the first few regions of equal score, and these should have different boxes.
    """
    turns = ((turn, item) for group in groups for turn, item in enumerate(group))
    return (item for _, item in sorted(turns, key=operator.itemgetter(0)))
