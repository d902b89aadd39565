"""The images that `grain-jax embed` is given, in parts: files with the same number in their names.

A folder is listed once, in order, to DIR/images.jsonl; from there on it is a file of annotations. Each reader is one
of `data.sources`; nothing but a record set needs TensorFlow.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from grain_jax.core import atomic, regular_file
from grain_jax.data import sources
from grain_jax.data.embed import output
from grain_jax.data.sources import annotations as annotations_source
from grain_jax.data.sources import base, tfds

LIST = "images.jsonl"
_BESIDE = (".txt", ".json")  # files that stand beside images
_KINDS = "a folder of images, a .tar or a folder of them, a record set, or an A.jsonl"
_READERS = dict(folder="annotations", annotations="annotations", tars="webdataset", records="tfds")


def find(
    source: str,
    *,
    images: str | None,
    split: str,
    shard_size: int,
    scratch: epath.Path,
    boxes: bool = False,
) -> dict[str, Any]:
    """Lists a source.

    Args:
      source: a folder of images, sub-folders included; a tar, or a folder of tars; a TFDS set; or an A.jsonl.
      images: of an A.jsonl, the folder that its paths start from; None: the folder it lies in.
      split: of a TFDS set; "" is train.
      shard_size: images a part; a tar is a part.
      scratch: folder that all processes read, for the list of a folder's images.
      boxes: whether boxes of the source are wanted, which an A.jsonl and a record set have.

    Returns:
      Values of JSON. `source`: its kind, path and digest. `images`: the folder that paths start from, or "".
      `total`: the number of images; None for tars. `parts`: each with `name`, `size` (images; 0 for a tar) and the
      arguments of its reader.

    Raises:
      sources.SourceError: there is no such source, it holds no image, or an option does not suit it.
    """
    path = absolute(source)
    kind = _kind(path, scratch / LIST)
    if not kind:
        raise sources.SourceError(f"{source}: no such file or folder, expected {_KINDS}")
    for flag, wanted, suits, kinds in (
        (f"--images {images}", images, ("annotations",), "an A.jsonl"),
        (f"--split {split}", split, ("records",), "a record set"),
        ("--boxes given", boxes, ("annotations", "records"), "an A.jsonl or a record set"),
    ):
        if wanted and kind not in suits:
            raise sources.SourceError(f"{flag}: got {source}, expected it with {kinds}")
    folder = file = ""
    if kind in ("folder", "annotations"):
        folder, file = str(path), str(scratch / LIST)
        if kind == "annotations":
            folder, file = str(absolute(images) if images else path.parent), str(path)
            if not epath.Path(folder).is_dir():
                raise sources.SourceError(f"--images {images}: no such folder, expected images")
    options = sources.Options(
        folder or str(path), annotations=(file,), split=split, shard_size=shard_size
    )
    try:
        shards = sources.shards(_READERS[kind], options)
    except sources.SourceError:
        if kind == "tars":
            raise sources.SourceError(f"{source}: got no images there, expected {_KINDS}") from None
        raise
    parts = [{"name": x.name, "reader": x.source, "size": _size(x), **x.arguments} for x in shards]
    total = sum(part["size"] for part in parts)
    if kind != "tars" and not total:
        raise sources.SourceError(f"{source}: got no images there, expected {_KINDS}")
    named: Any = [[part["name"], part["size"]] for part in parts]
    if kind == "tars":
        named = [[part["name"], regular_file.length(part["tar"])] for part in parts]
    elif kind == "records":
        named.append(regular_file.read_text(tfds.directory(path) / "dataset_info.json", _KINDS))
    digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
    described = {"kind": kind, "path": str(path), "digest": digest}
    return {"source": described, "images": folder, "total": total or None, "parts": parts}


def _size(shard: sources.SourceShard) -> int:
    """The number of images of a shard; 0 of a tar."""
    numbers = shard.arguments
    if "lines" in numbers:
        return numbers["lines"]
    return numbers.get("stop", 0) - numbers.get("start", 0)


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, ~ expanded and links followed; a URL stays."""
    path = epath.Path(path)
    return path if "://" in str(path) else epath.Path(os.path.realpath(path.expanduser()))


def _kind(path: epath.Path, listed: epath.Path) -> str:
    """What lies at a path: a key of _READERS, or ""; the images of a folder are listed."""
    if regular_file.is_one(path):
        return "tars" if path.suffix == ".tar" else "annotations"
    if not path.is_dir():
        return ""
    if any(path.glob("*.tar")):
        return "tars"
    try:
        tfds.directory(path)
    except sources.SourceError:
        return "folder" if _write_list(path, listed) else "tars"
    return "records"


def _write_list(folder: epath.Path, file: epath.Path) -> int:
    """Writes a line for each image of the folder and its sub-folders, by name; hidden ones do not count.

    Returns: their number.
    Raises: sources.SourceError: embeddings were begun with another list, which stays.
    """
    text = "".join(json.dumps({"image": image}) + "\n" for image in _walk(folder, ""))
    begun = (file.parent / output.SETTINGS).exists() and file.exists()
    if begun and file.read_text() != text:
        raise sources.SourceError(
            f"{folder}: its images are not those that {file} lists, which {file.parent} was begun with;"
            " give another --output, or delete this one"
        )
    atomic.write_text(file, text)
    return text.count("\n")


def _walk(folder: epath.Path, below: str) -> Iterator[str]:
    # Names alone: a path takes ten times the memory, and to ask the disk about each image takes minutes.
    for name in sorted(path.name for path in folder.iterdir()):
        if name.startswith("."):
            continue
        if name.lower().endswith(base.IMAGE_ENDINGS):
            yield below + name
        elif not name.endswith(_BESIDE) and (folder / name).is_dir():
            yield from _walk(folder / name, f"{below}{name}/")


def images(part: Mapping[str, Any]) -> Iterator[Callable[[], sources.Image | sources.Fault]]:
    """A function for each image of a part, in order, that reads it; files are read by the thread that calls it."""
    shard = sources.SourceShard(part["name"], part, part["reader"])
    if part["reader"] == "annotations":
        for line, where in annotations_source.lines(shard):
            read = (line, where, part["images"])
            yield functools.partial(annotations_source.image, *read)
    else:
        for image in sources.read(shard):
            yield lambda image=image: image
