"""Data sources: a reader of each public format by its name, and any other as `module:Class`.

  shards(source, options)   the source in pieces that are worked on apart
  read(shard)               the images of a piece, and the faults of the others

What a source is: `data/sources/base.py`.
"""

from collections.abc import Iterator, Mapping

from grain_jax.data.sources import own_options
from grain_jax.data.sources.annotations import Annotations
from grain_jax.data.sources.base import CAUSES, Fault, Image, Options, Shard, Source, SourceError
from grain_jax.data.sources.coco import Coco
from grain_jax.data.sources.fg_ovd import FgOvd
from grain_jax.data.sources.finehard import FineHard
from grain_jax.data.sources.flickr30k_entities import Flickr30kEntities
from grain_jax.data.sources.folder import Folder
from grain_jax.data.sources.grit import Grit
from grain_jax.data.sources.karpathy import Karpathy
from grain_jax.data.sources.lvis import Lvis
from grain_jax.data.sources.refcoco import RefCoco
from grain_jax.data.sources.tfds import Tfds
from grain_jax.data.sources.visual_genome import VisualGenome
from grain_jax.data.sources.webdataset import WebDataset

from grain_jax import named
from grain_jax.files import regular_file

__all__ = [
    "CAUSES",
    "SOURCES",
    "Fault",
    "Image",
    "Options",
    "Shard",
    "Source",
    "SourceError",
    "make",
    "read",
    "shards",
]

SOURCES: dict[str, type[Source]] = {
    "annotations": Annotations,
    "coco": Coco,
    "fg_ovd": FgOvd,
    "finehard": FineHard,
    "flickr30k_entities": Flickr30kEntities,
    "folder": Folder,
    "grit": Grit,
    "karpathy": Karpathy,
    "lvis": Lvis,
    "refcoco": RefCoco,
    "tfds": Tfds,
    "visual_genome": VisualGenome,
    "webdataset": WebDataset,
}


def make(source: str, own: Mapping[str, str] | None = None) -> Source:
    """The source of that name, or `module:Class`, with options of its own.

    Raises:
      errors.UserError: there is no such source; the line lists what there is.
      SourceError: the class is no source, or an option is wrong.
    """
    with named.importing():  # the name is the user's, from the command line
        found = named.find("data source", source, SOURCES)
    return own_options.make(source, found, own or {})


def shards(source: str, options: Options, own: Mapping[str, str] | None = None) -> list[Shard]:
    """The source's shards, in order; the same again as long as the source is the same.

    Reads whole annotation files where the source has such, and writes lists of their images to
    `options.scratch`, which workers must be able to read.

    Raises:
      errors.UserError: as `make`; SourceError: the source's files are not as expected.
    """
    try:
        found = make(source, own).shards(options)
    except regular_file.FileError as error:
        raise SourceError(str(error)) from None
    if not found:
        raise SourceError(f"source {source}: got no images from {options.images}, expected some")
    return [shard._replace(source=source, options=dict(own or {})) for shard in found]


def read(shard: Shard) -> Iterator[Image | Fault]:
    """The shard's images in order, each one as Image or as Fault; needs no other shard."""
    return make(shard.source, shard.options).read(shard)
