"""Data sources: a reader of each public format by its name, and any other as `module:Class`.

  shards(source, options)   the source in pieces that are worked on apart
  read(shard)               the images of a piece, and the faults of the others

What a source is: `data/sources/base.py`.
"""

import dataclasses
import importlib
import typing
from collections.abc import Iterator, Mapping

import msgspec

from grain_jax import config
from grain_jax.core import named, regular_file
from grain_jax.data.sources.base import (
    CAUSES,
    Fault,
    Image,
    Options,
    Source,
    SourceError,
    SourceShard,
)

__all__ = [
    "CAUSES",
    "SOURCES",
    "Fault",
    "Image",
    "Options",
    "SourceShard",
    "Source",
    "SourceError",
    "make",
    "read",
    "shards",
]

# The name of a module here -> its class.
SOURCES = {
    "annotations": "Annotations",
    "coco": "Coco",
    "csv": "Csv",
    "fg_ovd": "FgOvd",
    "finehard": "FineHard",
    "flickr30k_entities": "Flickr30kEntities",
    "folder": "Folder",
    "grit": "Grit",
    "hf-dataset": "HfDataset",
    "karpathy": "Karpathy",
    "lvis": "Lvis",
    "parquet": "Parquet",
    "refcoco": "RefCoco",
    "tfds": "Tfds",
    "visual_genome": "VisualGenome",
    "webdataset": "WebDataset",
}


def make(source: str, own: Mapping[str, str] | None = None) -> Source:
    """The source of that name, or `module:Class`.

    Args:
      source: the name.
      own: texts of its own options: fields of the class, a dataclass, that are str, int, float or bool.

    Raises:
      errors.UserError: there is no such source; the line lists what there is.
      SourceError: the class is no source, there is no such option, or a value is of another type or refused by the
        class (a ValueError of its `__post_init__`).
    """
    with named.importing():  # the name is the user's, from the command line
        cls = named.find("data source", source, SOURCES)
    if source in SOURCES:
        cls = getattr(importlib.import_module(f"{__name__}.{source.replace('-', '_')}"), cls)
    missing = [x for x in ("images_are_files", "shards", "read") if not hasattr(cls, x)]
    if missing or not isinstance(cls, type):
        got, expected = (
            ", ".join(missing) or "no class",
            "a class as data/sources/base.py: Source describes",
        )
        raise SourceError(f"data source {source!r}: has no {got}, expected {expected}")
    kinds = typing.get_type_hints(cls)
    known = (
        [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    )
    values = {}
    for key, text in (own or {}).items():
        if key not in known:
            said = config.unknown_key(key, known) if known else "the source has no options"
            raise SourceError(f"--option {key} of data source {source!r}: {said}")
        try:
            values[key] = msgspec.convert(
                text, kinds[key], strict=False, dec_hook=lambda kind, given: kind(given)
            )
        except msgspec.ValidationError:
            expected = getattr(kinds[key], "__name__", kinds[key])
            raise SourceError(f"--option {key}: got {text!r}, expected {expected}") from None
    try:
        return cls(**values)
    except ValueError as error:
        raise SourceError(f"--option of data source {source!r}: {error}") from None


def shards(
    source: str, options: Options, own: Mapping[str, str] | None = None
) -> list[SourceShard]:
    """The source's shards, in order; the same again as long as the source is the same.

    Reads whole annotation files where the source has such, and writes lists of their images to
    `options.scratch`, which workers must be able to read.

    Raises:
      errors.UserError: as `make`; SourceError: the source's files are not as expected.
    """
    made = make(source, own)
    if not options.images and getattr(made, "needs_images", True):
        raise SourceError(f"source {source}: got no --images, expected the folder of the images")
    if options.label_text and not getattr(made, "has_labels", False):
        got = f"--label-text: the regions of source {source} have descriptions, no labels"
        raise SourceError(f"{got}, expected none")
    try:
        found = made.shards(options)
    except regular_file.FileError as error:
        raise SourceError(str(error)) from None
    if not found:
        raise SourceError(
            f"source {source}: got no images from {options.images or ', '.join(options.annotations)}, expected some"
        )
    return [shard._replace(source=source, options=dict(own or {})) for shard in found]


def read(shard: SourceShard) -> Iterator[Image | Fault]:
    """The shard's images in order, each one as Image or as Fault; needs no other shard."""
    return make(shard.source, shard.options).read(shard)
