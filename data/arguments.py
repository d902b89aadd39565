"""The flags of `grain-jax build`."""

import dataclasses
import re
from collections.abc import Callable

from grain_jax.cli.flags import flag, many, share
from grain_jax.cli.parser import Command


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How an image is stored: "original", "png" or "jpeg" with `quality`; side in pixels, 0 to keep it."""

    kind: str = "original"
    quality: int = 0
    size: int = 0

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


def _matching(pattern: str, expected: str) -> Callable[[str], str]:
    """A parser of texts in that form; it raises ValueError for others."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"got {text!r}, expected {expected}")
        return text

    return parse


set_name = _matching("[a-z][a-z0-9_]*", "lower-case letters, digits and _, a letter first")
label_text = _matching(r"[^{}]*\{\}[^{}]*", "one {} in the place of the label")


def option(text: str) -> tuple[str, str]:
    """The key and the value of --option. Raises ValueError."""
    key, _, value = _matching("[^=]+=.*", "KEY=VALUE")(text).partition("=")
    return key, value


class Build(Command, name="build"):
    """Makes TFRecords to train on from images and annotations.

    It names all faults, by file and line, before it writes the dataset.

    Example:
      grain-jax build --annotations A.jsonl --images images --output records --name mine
      grain-jax build --source coco --annotations instances.json --images images \\
          --output records --name mine --label-text "a photo of a {}"

    what is built:
      --annotations FILE [FILE ...]  A.jsonl, one JSON object per line; or the files of --source
      --images DIR             folder of the images; the paths in the annotations start from it
      --source NAME|module:Class  format of the annotations: coco, csv, hf-dataset, parquet, webdataset, ...
      --option KEY=VALUE [KEY=VALUE ...]  options of the source, such as the names of columns
      --split NAME             split of the source, if it has splits
      --label-text TEXT        description of a labelled box, {} for the label: "a photo of a {}"
      --output DIR             write to DIR/NAME/1.0.0
      --name NAME              name of the dataset, for input.name and TFDS
      --[no-]overwrite         replace an existing dataset of that name

    what is left out:
      --max-faults SHARE       leave faulty lines out, up to this share of all lines, 0 to 1
      --holdout SHARE          hold out this share of the images, 0 to 1, as the split validation
      --exclude-duplicates-of SET_DIR [SET_DIR ...]  leave out images of these datasets of grain-jax build, in
        any size or compression

    speed:
      --workers N              processes (default: one per core; none for small datasets)

    how images are stored:
      --store-size S           resize images to S x S pixels (default: keep their size)
      --encoding original|png|jpeg:Q  original keeps files that need no change; Q is JPEG's quality, 1 to 100
      --num-shards N           number of shards (default: 64 MB each, a multiple of 16)
    """

    annotations: list[str] = many()
    images: str = ""
    source: str = "annotations"
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
    store_size: int | None = None
    encoding: Encoding = flag(Encoding(), parse=encoding)
    num_shards: int | None = None

    @property
    def stored(self) -> Encoding:
        """How an image is stored, by all flags about it."""
        return dataclasses.replace(self.encoding, size=self.store_size or 0)
