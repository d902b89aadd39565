"""The images that `grain-jax embed` reads, in parts: shards of a data source; files with the same number hold them."""

import hashlib
import json
import os
from typing import Any

from etils import epath

from grain_jax.core import regular_file
from grain_jax.data import job, sources
from grain_jax.data.embed.arguments import Embed
from grain_jax.data.sources import tfds

_SOURCES = dict(folder="folder", annotations="annotations", tars="webdataset", records="tfds")


def find(args: Embed, output: job.Output) -> dict[str, Any]:
    """Lists the source of a command; `output` gets the lists of a folder's images, which all processes read.

    Returns:
      Values of JSON. `source`: its kind, path and image list (a digest). `images`: the folder that paths start from, or
      "". `parts`: the values of each SourceShard.

    Raises:
      sources.SourceError: there is no such source, or it holds no image.
    """
    path = absolute(args.source)
    kind = _kind(path)
    folder = str(absolute(args.images or path.parent) if kind == "annotations" else path)
    scratch = str(output.path("lists"))
    options = sources.Options(folder, (str(path),), args.split, scratch, args.shard_size)
    shards = sources.shards(_SOURCES[kind], options)
    digest = hashlib.sha256(json.dumps([shard.name for shard in shards]).encode()).hexdigest()[:16]
    return {
        "source": {"kind": kind, "path": str(path), "image_list": digest},
        "images": folder if kind in ("folder", "annotations") else "",
        "parts": shards,
    }


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, ~ expanded and links followed; a URL stays."""
    path = epath.Path(path)
    return path if "://" in str(path) else epath.Path(os.path.realpath(path.expanduser()))


def _kind(path: epath.Path) -> str:
    """What lies at a path: a key of _SOURCES. Raises SourceError if nothing does."""
    if regular_file.is_one(path):
        return "tars" if path.suffix == ".tar" else "annotations"
    if not path.is_dir():
        expected = "a folder of images, a .tar or a folder of them, a record set, or an A.jsonl"
        raise sources.SourceError(f"{path}: no such file or folder, expected {expected}")
    if any(path.glob("*.tar")):
        return "tars"
    try:
        tfds.directory(path)
    except sources.SourceError:
        return "folder"
    return "records"
