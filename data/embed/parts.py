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
from typing import Any, NamedTuple

from etils import epath

from grain_jax.core import regular_file
from grain_jax.data import sources
from grain_jax.data.embed import embeddings
from grain_jax.data.sources import annotations as annotations_source
from grain_jax.data.sources import base, join, tfds, webdataset

LIST = "images.jsonl"
_BESIDE = (".txt", ".json")  # files that stand beside images
_KINDS = "a folder of images, a .tar or a folder of them, a record set, or an A.jsonl"


class Listing(NamedTuple):
    """A source in parts."""

    kind: str  # "folder", "annotations", "tars" or "records"
    path: str
    images: str  # folder that the paths of a folder or an A.jsonl start from; else ""
    split: str  # of a record set; else ""
    digest: str  # of the names and the order of its images, of the lines of an A.jsonl, of the tars and their sizes
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
      orientation: of its images, as of `grain_jax.core.images`.

    Raises:
      sources.SourceError: there is no such source, it holds no image, or an option does not suit it.
    """
    path = absolute(source)
    is_file = regular_file.is_one(path)
    if not is_file and not path.is_dir():
        raise sources.SourceError(f"{source}: no such file or folder, expected {_KINDS}")
    if is_file and path.suffix != ".tar":
        kind = "annotations"
    elif is_file or any(path.glob("*.tar")):
        kind = "tars"
    elif _is_record_set(path):
        kind = "records"
    else:
        kind = "folder" if _write_list(path, scratch / LIST) else "tars"
    for flag, value, suits in (("--images", images, "annotations"), ("--split", split, "records")):
        if value and kind != suits:
            what = "an A.jsonl" if suits == "annotations" else "a record set"
            raise sources.SourceError(f"{flag} {value}: got {source}, expected it with {what}")
    if boxes and kind not in ("annotations", "records"):
        raise sources.SourceError(
            f"--boxes given: got {source}, expected it with an A.jsonl or a record set"
        )
    folder, known = "", b""
    if kind == "tars":
        if not is_file and not any(any(path.glob(tars)) for tars in ("*.tar", "*/*.tar")):
            raise sources.SourceError(f"{source}: got no images there, expected {_KINDS}")
        options = sources.Options(str(path), orientation=orientation)
        shards = webdataset.WebDataset().shards(options)
        sizes = [regular_file.length(shard.arguments["tar"]) or 0 for shard in shards]
    elif kind == "records":
        split = split or "train"
        known = (tfds.directory(path) / "dataset_info.json").read_bytes()
        options = sources.Options(str(path), split=split, shard_size=shard_size)
        shards = tfds.Tfds().shards(options)
        sizes = [shard.arguments["stop"] - shard.arguments["start"] for shard in shards]
    else:
        folder, file = str(path), path
        if kind == "folder":
            file = scratch / LIST
        else:
            folder = str(absolute(images) if images else path.parent)
            if not epath.Path(folder).is_dir():
                raise sources.SourceError(f"--images {images}: no such folder, expected images")
        options = sources.Options(
            folder, annotations=(str(file),), shard_size=shard_size, orientation=orientation
        )
        shards = annotations_source.Annotations().shards(options)
        sizes = [shard.arguments["lines"] for shard in shards]
    if not sum(sizes):
        raise sources.SourceError(f"{source}: got no images there, expected {_KINDS}")
    names = [[shard.name, size] for shard, size in zip(shards, sizes)]
    digest = hashlib.sha256(json.dumps(names).encode() + known).hexdigest()[:16]
    parts = [
        {"reader": _READERS[kind], "name": shard.name, "size": size, **shard.arguments}
        for shard, size in zip(shards, sizes)
    ]
    total = None if kind == "tars" else sum(sizes)
    return Listing(kind, str(path), folder, split, digest, total, parts)


_READERS = {
    "folder": "annotations",
    "annotations": "annotations",
    "tars": "webdataset",
    "records": "tfds",
}


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, ~ expanded and links followed; a URL stays."""
    path = epath.Path(path)
    return path if "://" in str(path) else epath.Path(os.path.realpath(path.expanduser()))


def _is_record_set(path: epath.Path) -> bool:
    try:
        tfds.directory(path)
    except sources.SourceError:
        return False
    return True


def _write_list(folder: epath.Path, file: epath.Path) -> int:
    """Writes a line for each image of the folder and its sub-folders, by name; hidden ones do not count.

    Returns: their number.
    Raises: sources.SourceError: embeddings were begun with another list, which stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for path in (file, new := file.with_name(f"{file.name}.new")):
        if path.exists() and not regular_file.is_one(path):
            raise sources.SourceError(f"{path}: got a folder, pipe or device; move it elsewhere")
    new.unlink(missing_ok=True)  # it may be a link
    count = 0
    try:
        with new.open("w") as out:
            for image in _walk(folder, ""):
                out.write(json.dumps({"image": image}) + "\n")
                count += 1
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if (
        file.exists()
        and _sha256(file) != _sha256(new)
        and (file.parent / embeddings.SETTINGS).exists()
    ):
        new.unlink()
        raise sources.SourceError(
            f"{folder}: its images are not those that {file} lists, which {file.parent} was begun with;"
            " give another --output, or delete this one"
        )
    if "://" in str(file):  # some object stores cannot rename
        file.write_bytes(new.read_bytes())
        new.unlink()
    else:
        new.replace(file)
    return count


def _sha256(file: epath.Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _walk(folder: epath.Path, below: str) -> Iterator[str]:
    # Names alone: a path takes ten times the memory, and to ask the disk about each image takes minutes.
    for name in sorted(path.name for path in folder.iterdir()):
        if name.startswith("."):
            continue
        if name.lower().endswith(base.IMAGE_ENDINGS):
            yield below + name
        elif not name.endswith(_BESIDE) and (folder / name).is_dir():
            yield from _walk(folder / name, f"{below}{name}/")


def images(part: dict[str, Any]) -> Iterator[Callable[[], sources.Image | sources.Fault]]:
    """A function for each image of a part, in order, that reads it; files are read by the thread that calls it."""
    shard = sources.SourceShard(part["name"], part, part["reader"])
    if part["reader"] == "annotations":
        for line, where in annotations_source.lines(shard):
            read = (line, where, part["images"], part["orientation"])
            yield functools.partial(annotations_source.image, *read)
    else:
        for found in sources.read(shard):
            yield functools.partial(_as_it_is, found)


def _as_it_is(found: sources.Image | sources.Fault) -> sources.Image | sources.Fault:
    return found


def read_again(
    wanted: Iterable[tuple[Mapping[str, Any], str]], folder: str | None = None
) -> dict[tuple[str, str], sources.Image | sources.Fault]:
    """Reads single images of parts.

    Args:
      wanted: (part, path of the image) of each.
      folder: where the images, the tars or the record set lie now; None: where the part says, on this machine alone.

    Returns: (name of the part, path) -> the image, or why there is none.
    """
    found: dict[tuple[str, str], sources.Image | sources.Fault] = {}
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


_Read = Iterator[tuple[str, sources.Image | sources.Fault]]


def _files_again(part: Mapping[str, Any], paths: set[str], folder: str | None) -> _Read:
    for path in paths:
        yield path, join.load(base.Entry(path), folder or part["images"], part["orientation"])


def _tar_again(part: Mapping[str, Any], paths: set[str], folder: str | None) -> _Read:
    tar = part["tar"]
    if folder:
        tar = str(regular_file.below(folder, f"{part['prefix']}.tar", part["name"]))
    left = set(paths)
    for found in sources.read(
        sources.SourceShard(part["name"], {**part, "tar": tar}, part["reader"])
    ):
        if found.image in left:
            left.remove(found.image)
            yield found.image, found
        if not left:
            return
    for path in left:
        there = regular_file.is_one(tar)
        yield (
            path,
            sources.Fault(path, "no such file", f"there is {'none in' if there else 'no'} {tar}"),
        )


def _records_again(part: Mapping[str, Any], paths: set[str], folder: str | None) -> _Read:
    for path in paths:
        number = int(path.rpartition("/")[2].partition(".")[0])
        if not part["start"] <= number < part["stop"]:
            raise sources.SourceError(f"got number {number}, expected one of {part['name']}")
        arguments = {**part, "start": number, "stop": number + 1}
        arguments["directory"] = folder or part["directory"]
        for found in sources.read(sources.SourceShard(part["name"], arguments, part["reader"])):
            yield path, found


# Of each reader: the function, and the key of the place where the images lie.
_AGAIN = {
    "annotations": (_files_again, "images"),
    "webdataset": (_tar_again, "tar"),
    "tfds": (_records_again, "directory"),
}
