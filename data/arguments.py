"""The flags of `grain-jax build`."""

import dataclasses
import re

from grain_jax.cli.flags import flag, many, share
from grain_jax.cli.parser import Command


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How an image is stored: `kind` "original", "png" or "jpeg" with `quality`; `size` x `size`, 0 = as it is."""

    kind: str = "original"
    quality: int = 0
    size: int = 0

    @property
    def tfds_format(self) -> str | None:
        """What TFDS's Image feature is told; None where files of both kinds may stand together."""
        return None if self.kind == "original" else self.kind

    def __str__(self) -> str:
        return f"jpeg:{self.quality}" if self.kind == "jpeg" else self.kind


def encoding(text: str) -> Encoding:
    """The value of --encoding, without a size."""
    kind, _, quality = text.partition(":")
    if text in ("original", "png"):
        return Encoding(kind)
    if kind == "jpeg" and quality.isdecimal() and 1 <= int(quality) <= 100:
        return Encoding(kind, quality=int(quality))
    raise ValueError(f"got {text!r}, expected original, png or jpeg:Q, Q in 1..100")


def set_name(text: str) -> str:
    """The name of a set, if it is one. Raises ValueError."""
    if re.fullmatch(r"[a-z][a-z0-9_]*", text):
        return text
    raise ValueError(
        f"got {text!r}, expected a TFDS name: lower-case letters, digits and _, a letter first"
    )


def option(text: str) -> tuple[str, str]:
    """The key and the value of --option. Raises ValueError."""
    key, equals, value = text.partition("=")
    if key and equals:
        return key, value
    raise ValueError(f"got {text!r}, expected KEY=VALUE")


def label_text(text: str) -> str:
    """The value of --label-text. Raises ValueError."""
    if text.count("{}") == 1:
        return text
    raise ValueError(f"got {text!r}, expected one {{}} in the place of the label")


class Stored(Command):
    """Base of the commands that build a set.

    how images are stored:
      --store-size S           resize images to S x S pixels once, here (default: as they are)
      --encoding original|png|jpeg:Q  original keeps files that need no change; Q is JPEG's quality, 1 to 100
      --num-shards N           files of the set (default: 64 MB each, a multiple of 16)
    """

    last = True
    store_size: int | None = None
    encoding: Encoding = flag(Encoding(), parse=encoding)
    num_shards: int | None = None

    @property
    def stored(self) -> Encoding:
        """How an image is stored, by all of these flags."""
        return dataclasses.replace(self.encoding, size=self.store_size or 0)


class Build(Stored, name="build"):
    """Makes TFRecords to train on, of images and annotations.

    First every line is checked and every image decoded: all faults are named, by file and line, before anything
    is written. Then TFDS's writer makes DIR/NAME/1.0.0.

    Example:
      grain-jax build --annotations A.jsonl --images images --output records --name mine
      grain-jax build --source coco --annotations instances.json --images images --output records --name mine \\
          --label-text "a photo of a {}"

    what is built:
      --annotations FILE [FILE ...]  A.jsonl, one JSON object a line; or what --source reads
      --images DIR             folder that the paths in it start from
      --source NAME|module:Class  a source of grain-jax annotate, such as coco, csv, hf-dataset, parquet, webdataset
      --option KEY=VALUE [KEY=VALUE ...]  options of the source's own, such as the names of columns
      --split NAME             of sources that have splits
      --label-text TEXT        description that a label becomes, {} in its place: "a photo of a {}"
      --output DIR             the set goes to DIR/NAME/1.0.0
      --name NAME              name of the set, for input.name and TFDS
      --[no-]overwrite         replace an existing set of that name

    what is left out:
      --max-faults SHARE       of the lines that may be faulty, 0 to 1; they are left out
      --holdout SHARE          of the images, 0 to 1, chosen by their hash: split validation beside train
      --exclude-duplicates-of SET_DIR [SET_DIR ...]  leave out images that these TFDS sets have, in whatever size or
        compression

    speed:
      --workers N              processes (default: one a core; none for small sets)
    """

    annotations: list[str] = many()
    images: str = ""
    source: str | None = None
    option: list[tuple[str, str]] = many(parse=option)
    split: str = ""
    label_text: str = flag("", parse=label_text)
    output: str
    name: str = flag(parse=set_name)
    overwrite: bool = False
    max_faults: float = share(0.01)
    holdout: float = share(0.0)
    exclude_duplicates_of: list[str] = many()
    workers: int | None = None

    def __post_init__(self):
        """Raises ValueError for flags that contradict each other."""
        for flag_name, value in (
            ("--option", self.option),
            ("--split", self.split),
            ("--label-text", self.label_text),
        ):
            if value and not self.source:
                raise ValueError(f"{flag_name}: got no --source, expected the one that it is of")
        if not self.source and len(self.annotations) != 1:
            raise ValueError(
                f"--annotations: got {len(self.annotations)} files, expected A.jsonl; or name a --source"
            )
        if not self.source and not self.images:
            raise ValueError("--images DIR: missing; folder that the paths in A.jsonl start from")
