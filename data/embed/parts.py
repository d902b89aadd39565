"""The images that `grain-jax embed` is given, in parts: one Parquet file each.

A folder is listed once, in order, to DIR/images.jsonl; from there on it is a file of annotations. Each reader is one
of `data.sources`; nothing but a record set needs TensorFlow.
"""

import functools
import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
from etils import epath

from grain_jax.core import atomic, regular_file
from grain_jax.data import sources
from grain_jax.data.embed import embeddings
from grain_jax.data.sources import annotations as annotations_source
from grain_jax.data.sources import base, join, tfds, webdataset

LIST = "images.jsonl"
_BESIDE = (".txt", ".json")  # files that stand beside images
_KINDS = "a folder of images, a .tar or a folder of them, a record set, or an A.jsonl"
_READERS = dict(folder="annotations", annotations="annotations", tars="webdataset", records="tfds")

Found = sources.Image | sources.Fault


class Listing(msgspec.Struct):
    """A source in parts."""

    source: embeddings.Source
    total: int | None  # number of images; None where it is not known, of tars
    parts: list[dict[str, Any]]  # arguments of `images`, and `size`: images, or bytes of a tar


def find(
    source: str,
    *,
    images: str | None,
    split: str,
    shard_size: int,
    scratch: epath.Path,
    boxes: bool = False,
    texts: bool = False,
    orientation: str = "exif",
) -> Listing:
    """Lists a source.

    Args:
      source: a folder of images, sub-folders included; a tar, or a folder of tars; a TFDS set; or an A.jsonl.
      images: of an A.jsonl, the folder that its paths start from; None: the folder it lies in.
      split: of a TFDS set; "" is train.
      shard_size: images a part; a tar is a part.
      scratch: folder that all processes read, for the list of a folder's images.
      boxes: whether boxes of the source are wanted, which an A.jsonl and a record set have.
      texts: whether texts of the source are wanted, which a folder of images has not.
      orientation: of its images, as of `grain_jax.core.images`.

    Raises:
      sources.SourceError: there is no such source, it holds no image, or an option does not suit it.
    """
    path = absolute(source)
    kind = _kind(path, scratch / LIST)
    if not kind:
        raise sources.SourceError(f"{source}: no such file or folder, expected {_KINDS}")
    for flag, wanted, suits, what in (
        (f"--images {images}", images, ("annotations",), "an A.jsonl"),
        (f"--split {split}", split, ("records",), "a record set"),
        ("--boxes given", boxes, ("annotations", "records"), "an A.jsonl or a record set"),
        ("--texts", texts, ("annotations", "records", "tars"), "a source with captions"),
    ):
        if wanted and kind not in suits:
            raise sources.SourceError(f"{flag}: got {source}, expected it with {what}")
    folder, known = "", b""
    options = sources.Options(str(path), shard_size=shard_size)
    if kind == "tars":
        if not (path.suffix == ".tar" or any(any(path.glob(x)) for x in ("*.tar", "*/*.tar"))):
            raise sources.SourceError(f"{source}: got no images there, expected {_KINDS}")
        shards = webdataset.WebDataset().shards(options)
        sizes = [regular_file.length(shard.arguments["tar"]) or 0 for shard in shards]
    elif kind == "records":
        split = split or "train"
        file = tfds.directory(path) / "dataset_info.json"
        known = regular_file.read(file, regular_file.MAX_JSON, "the description of a record set")
        shards = tfds.Tfds().shards(options._replace(split=split))
        sizes = [shard.arguments["stop"] - shard.arguments["start"] for shard in shards]
    else:
        folder, file = str(path), scratch / LIST
        if kind == "annotations":
            folder, file = str(absolute(images) if images else path.parent), path
            if not epath.Path(folder).is_dir():
                raise sources.SourceError(f"--images {images}: no such folder, expected images")
        options = options._replace(images=folder, annotations=(str(file),))
        shards = annotations_source.Annotations().shards(options)
        sizes = [shard.arguments["lines"] for shard in shards]
    if not sum(sizes):
        raise sources.SourceError(f"{source}: got no images there, expected {_KINDS}")
    digest = digest_of([(shard.name, size) for shard, size in zip(shards, sizes)], known)
    parts = [
        {"reader": _READERS[kind], "name": shard.name, "size": size, **shard.arguments}
        for shard, size in zip(shards, sizes)
    ]
    total = None if kind == "tars" else sum(sizes)
    return Listing(embeddings.Source(kind, str(path), folder, split, digest), total, parts)


def digest_of(named: Iterable[tuple[str, int]], known: bytes = b"") -> str:
    """The digest of a source: of the names and sizes of its parts, and what is `known` of a record set."""
    names = json.dumps([[name, size] for name, size in named])
    return hashlib.sha256(names.encode() + known).hexdigest()[:16]


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, ~ expanded and links followed; a URL stays."""
    path = epath.Path(path)
    return path if "://" in str(path) else epath.Path(os.path.realpath(path.expanduser()))


def _kind(path: epath.Path, listed: epath.Path) -> Any:
    """What lies at a path, as `embeddings.Source.kind`, or None; the images of a folder are listed."""
    if regular_file.is_one(path):
        return "tars" if path.suffix == ".tar" else "annotations"
    if not path.is_dir():
        return None
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
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"image": image}) + "\n" for image in _walk(folder, "")]
    if file.exists():
        if not regular_file.is_one(file):
            raise sources.SourceError(f"{file}: got a folder, pipe or device; move it elsewhere")
        begun = (file.parent / embeddings.SETTINGS).exists()
        if begun and file.read_bytes() != "".join(lines).encode():
            raise sources.SourceError(
                f"{folder}: its images are not those that {file} lists, which {file.parent} was begun with;"
                " give another --output, or delete this one"
            )
    atomic.write_text(file, "".join(lines))
    return len(lines)


def _walk(folder: epath.Path, below: str) -> Iterator[str]:
    # Names alone: a path takes ten times the memory, and to ask the disk about each image takes minutes.
    for name in sorted(path.name for path in folder.iterdir()):
        if name.startswith("."):
            continue
        if name.lower().endswith(base.IMAGE_ENDINGS):
            yield below + name
        elif not name.endswith(_BESIDE) and (folder / name).is_dir():
            yield from _walk(folder / name, f"{below}{name}/")


def images(part: Mapping[str, Any]) -> Iterator[Callable[[], Found]]:
    """A function for each image of a part, in order, that reads it; files are read by the thread that calls it."""
    if part["reader"] == "annotations":
        for line, where in annotations_source.lines(_shard(part)):
            read = (line, where, part["images"])
            yield functools.partial(annotations_source.image, *read)
    else:
        for found in sources.read(_shard(part)):
            yield lambda found=found: found


def _shard(part: Mapping[str, Any], **changes: Any) -> sources.SourceShard:
    return sources.SourceShard(part["name"], {**part, **changes}, part["reader"])


def read_again(
    wanted: Iterable[tuple[Mapping[str, Any], str]], folder: str | None = None
) -> dict[tuple[str, str], Found]:
    """Reads single images of parts.

    Args:
      wanted: (part, path of the image) of each.
      folder: where the images, the tars or the record set lie now; None: where the part says, on this machine alone.

    Returns: (name of the part, path) -> the image, or why there is none.
    """
    found: dict[tuple[str, str], Found] = {}
    of_part: dict[str, tuple[Mapping[str, Any], set[str]]] = {}
    for part, path in wanted:
        of_part.setdefault(part["name"], (part, set()))[1].add(path)
    for name, (part, paths) in of_part.items():
        read, place = _AGAIN[part["reader"]]
        try:
            # To epath "/" and the path "gs/bucket/x" are "gs://bucket/x" together.
            whole = (epath.Path(part[place]) / posixpath.normpath(x) for x in ("", *paths))
            if folder is None and any(map(regular_file.is_remote, whole)):
                raise sources.SourceError(
                    f"lies at {part[place]}, and nothing that a file names is fetched; give --images"
                )
            found |= {(name, path): image for path, image in read(part, paths, folder)}
        except (OSError, ValueError) as error:  # the folder or the record set is gone
            cause = "no such file"
            found |= {(name, path): sources.Fault(path, cause, str(error)) for path in paths}
    return found


_Read = Iterator[tuple[str, Found]]


def _files_again(part: Mapping[str, Any], paths: set[str], folder: str | None) -> _Read:
    for path in paths:
        yield path, join.load(base.Entry(path), folder or part["images"])


def _tar_again(part: Mapping[str, Any], paths: set[str], folder: str | None) -> _Read:
    tar = part["tar"]
    if folder:
        tar = str(regular_file.below(folder, f"{part['prefix']}.tar", part["name"]))
    there = f"there is {'none in' if regular_file.is_one(tar) else 'no'} {tar}"
    missing = {path: sources.Fault(path, "no such file", there) for path in paths}
    for found in sources.read(_shard(part, tar=tar)):
        if missing.pop(found.image, None):
            yield found.image, found
        if not missing:
            return
    yield from missing.items()


def _records_again(part: Mapping[str, Any], paths: set[str], folder: str | None) -> _Read:
    for path in paths:
        number = int(path.rpartition("/")[2].partition(".")[0])
        if not part["start"] <= number < part["stop"]:
            raise sources.SourceError(f"got number {number}, expected one of {part['name']}")
        one = dict(start=number, stop=number + 1, directory=folder or part["directory"])
        yield from ((path, found) for found in sources.read(_shard(part, **one)))


# Of each reader: the function, and the key of the place where the images lie.
_AGAIN = {
    "annotations": (_files_again, "images"),
    "webdataset": (_tar_again, "tar"),
    "tfds": (_records_again, "directory"),
}
