"""Data sources (base.py says what one is): a reader for each public format, others as `module:Class`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from etils import epath

from grain_jax import config
from grain_jax.core import named, regular_file
from grain_jax.core.annotations import Annotation, Fault
from grain_jax.data.sources.base import CAUSES, Options, Source, SourceError, SourceShard

Image = Annotation
__all__ = ["CAUSES", "Fault", "Image", "Options", "Source", "SourceError", "SourceShard"]

# The name of a source -> its module here and its class.
SOURCES = {
    "annotations": "annotations:AnnotationLines",
    "coco": "coco:Coco",
    "csv": "csv:Csv",
    "fg_ovd": "coco:Coco",
    "finehard": "json_sets:FineHard",
    "flickr30k_entities": "flickr30k_entities:Flickr30kEntities",
    "folder": "folder:Folder",
    "grit": "webdataset:Grit",
    "hf-dataset": "arrow_tables:HfDataset",
    "karpathy": "json_sets:Karpathy",
    "lvis": "coco:Lvis",
    "parquet": "arrow_tables:Parquet",
    "refcoco": "refcoco:RefCoco",
    "tfds": "tfds:Tfds",
    "visual_genome": "json_sets:VisualGenome",
    "webdataset": "webdataset:WebDataset",
}


def make(source: str, options: Mapping[str, str] | None = None) -> Source:
    """The source of that name, or `module:Class`.

    Its own options are texts: fields of the class, a dataclass, that are str, int, float or bool.
    Raises UserError: no such source, or SourceError: no such option, or its value is refused.
    """
    name = f"{__name__}.{SOURCES[source]}" if source in SOURCES else source
    with named.importing():  # the name is the user's, from the command line
        cls = named.find("data source", name, SOURCES)
    if not hasattr(cls, "shards"):
        expected = "a class as data/sources/base.py: Source describes"
        raise SourceError(f"data source {source!r}: has no shards, expected {expected}")
    known = [x.name for x in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    for key in options or {}:
        if key not in known:
            reason = config.unknown_key(key, known) if known else "the source has no options"
            raise SourceError(f"--option {key} of data source {source!r}: {reason}")
    try:
        return msgspec.convert(dict(options), cls, strict=False) if options else cls()
    except ValueError as error:
        raise SourceError(f"--option of data source {source!r}: {error}") from None


def of_path(path: epath.Path) -> str:
    """The name of the source that reads what lies at a path. Raises SourceError if nothing does."""
    if regular_file.is_one(path):
        return "webdataset" if path.suffix == ".tar" else "annotations"
    if not path.is_dir():
        expected = "a folder of images, a .tar or a folder of them, a record set, or an A.jsonl"
        raise SourceError(f"{path}: no such file or folder, expected {expected}")
    if any(path.glob("*.tar")):
        return "webdataset"
    is_set = any(path.glob("dataset_info.json")) or any(path.glob("*/dataset_info.json"))
    return "tfds" if is_set else "folder"


def of_flags(args: Any, scratch: str, shard_size: int) -> list[SourceShard]:
    """The shards of the source that the flags of build or annotate name; raises as `shards`."""
    options = Options(args.images, tuple(args.annotations), args.split, scratch, shard_size, args.label_text)
    return shards(args.source, options, dict(args.option))


def shards(source: str, options: Options, own_options: Mapping[str, str] | None = None) -> list[SourceShard]:
    """The source's shards, in order; the same again as long as the source is the same.

    Reads whole annotation files if the source has such, and writes lists of their images to
    `options.scratch`, which workers must be able to read. Raises UserError, also as `make`.
    """
    made = make(source, own_options)
    if not options.images and getattr(made, "needs_images", True):
        raise SourceError(f"source {source}: got no --images, expected the folder of the images")
    pieces = made.shards(options)
    if not pieces:
        named_files = options.images or ", ".join(options.annotations)
        raise SourceError(f"source {source}: got no images from {named_files}, expected some")
    return [shard._replace(source=source, options=dict(own_options or {})) for shard in pieces]


def read(shard: SourceShard) -> Iterator[Annotation | Fault]:
    """The shard's images in order, and a Fault for each one that cannot be used; needs no other shard."""
    return make(shard.source, shard.options).read(shard)
