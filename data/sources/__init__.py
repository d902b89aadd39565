"""Where images come from: one reader for each public format, behind two functions.

  shards(source, options)   the source in pieces that are worked on apart
  read(shard)               the images of a piece, and what is wrong with the others

A reader is a module of this folder with `shards(options)`, `read(shard)` and `FILES`: whether its
images are files below `options.images`.
"""

from collections.abc import Iterator
from types import ModuleType

from data.sources import (
    annotations,
    coco,
    finehard,
    flickr30k_entities,
    folder,
    grit,
    karpathy,
    lvis,
    refcoco,
    tfds,
    visual_genome,
    webdataset,
)
from data.sources.base import CAUSES, Fault, Options, Picture, Shard, SourceError

__all__ = [
    "CAUSES",
    "SOURCES",
    "Fault",
    "Options",
    "Picture",
    "Shard",
    "SourceError",
    "are_files",
    "read",
    "shards",
]

SOURCES: dict[str, ModuleType] = {
    "annotations": annotations,
    "coco": coco,
    "finehard": finehard,
    "flickr30k_entities": flickr30k_entities,
    "folder": folder,
    "grit": grit,
    "karpathy": karpathy,
    "lvis": lvis,
    "refcoco": refcoco,
    "tfds": tfds,
    "visual_genome": visual_genome,
    "webdataset": webdataset,
}


def shards(source: str, options: Options) -> list[Shard]:
    """The source's shards, in order; the same again as long as the source is the same.

    Reads whole annotation files where the source has such, and writes lists of their images to
    `options.scratch`, which workers must be able to read.

    Raises:
      SourceError: there is no such source, or its files are not as expected.
    """
    found = _module(source).shards(options)
    if not found:
        raise SourceError(f"source {source}: got no images from {options.images}, expected some")
    return found


def read(shard: Shard) -> Iterator[Picture | Fault]:
    """The shard's images in order, each one as Image or as Fault; needs no other shard."""
    return _module(shard.source).read(shard)


def are_files(source: str) -> bool:
    """Whether the images are files below `options.images`; else they come out of larger files."""
    return _module(source).FILES


def _module(source: str) -> ModuleType:
    if source not in SOURCES:
        raise SourceError(f"source {source!r}: expected one of: {', '.join(sorted(SOURCES))}")
    return SOURCES[source]
