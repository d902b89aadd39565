"""The images that `grain-jax embed` reads, in parts: files with the same number in their names.

A folder is listed once, in order, to DIR/images.jsonl; from there on it is a file of annotations. Each reader is one
of `data.sources`; only a record set needs TensorFlow.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from grain_jax.core import regular_file
from grain_jax.data import job, sources
from grain_jax.data.embed.arguments import Embed
from grain_jax.data.sources import annotations as annotations_source
from grain_jax.data.sources import base, tfds

LIST = "images.jsonl"
_BESIDE = (".txt", ".json")  # files that stand beside images
_KINDS = "a folder of images, a .tar or a folder of them, a record set, or an A.jsonl"
_READERS = dict(folder="annotations", annotations="annotations", tars="webdataset", records="tfds")


def find(args: Embed, output: job.Output) -> dict[str, Any]:
    """Lists the source of a command; `output` gets the list of a folder's images, which all processes read.

    Returns:
      Values of JSON. `source`: its kind, path and image list (a digest). `images`: the folder that paths start from, or
      "". `parts`: the values of each SourceShard.

    Raises:
      sources.SourceError: there is no such source, it holds no image, or no boxes that are wanted.
    """
    path = absolute(args.source)
    kind = _kind(path)
    if args.boxes == "given" and kind not in ("annotations", "records"):
        expected = "it with an A.jsonl or a record set"
        raise sources.SourceError(f"--boxes given: got {args.source}, expected {expected}")
    folder = str(absolute(args.images or path.parent) if kind == "annotations" else path)
    file = path
    if kind == "folder":
        file = output.path(LIST)
        output.put("".join(json.dumps({"image": image}) + "\n" for image in _walk(path, "")), LIST)
    options = sources.Options(folder, (str(file),), split=args.split, shard_size=args.shard_size)
    shards = sources.shards(_READERS[kind], options)
    length = lambda shard: regular_file.length(shard.arguments["tar"])
    names = [[shard.name, (length if kind == "tars" else size)(shard)] for shard in shards]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    return {
        "source": {"kind": kind, "path": str(path), "image_list": digest},
        "images": folder if _READERS[kind] == "annotations" else "",
        "parts": shards,
    }


def size(shard: sources.SourceShard) -> int:
    """The number of images of a shard; 0 of a tar."""
    values = shard.arguments
    return values.get("lines", values.get("stop", 0) - values.get("start", 0))


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, ~ expanded and links followed; a URL stays."""
    path = epath.Path(path)
    return path if "://" in str(path) else epath.Path(os.path.realpath(path.expanduser()))


def _kind(path: epath.Path) -> str:
    """What lies at a path: a key of _READERS. Raises SourceError if nothing does."""
    if regular_file.is_one(path):
        return "tars" if path.suffix == ".tar" else "annotations"
    if not path.is_dir():
        raise sources.SourceError(f"{path}: no such file or folder, expected {_KINDS}")
    if any(path.glob("*.tar")):
        return "tars"
    try:
        tfds.directory(path)
    except sources.SourceError:
        return "folder"
    return "records"


def _walk(folder: epath.Path, below: str) -> Iterator[str]:
    """The images of a folder and its sub-folders, by name; hidden ones do not count."""
    # Names alone: a path takes ten times the memory, and to ask the disk about each image takes minutes.
    for name in sorted(path.name for path in folder.iterdir()):
        if name.startswith("."):
            continue
        if name.lower().endswith(base.IMAGE_ENDINGS):
            yield below + name
        elif not name.endswith(_BESIDE) and (folder / name).is_dir():
            yield from _walk(folder / name, f"{below}{name}/")


def images(shard: sources.SourceShard) -> Iterator[Callable[[], sources.Image | sources.Fault]]:
    """A function per image of a part, in order, that reads it; the thread that calls it reads the file."""
    if shard.source == "annotations":
        folder = shard.arguments["images"]
        for line, where in annotations_source.lines(shard):
            yield functools.partial(annotations_source.image, line, where, folder)
    else:
        for image in sources.read(shard):
            yield lambda image=image: image
