"""Tar shards as img2dataset and webdataset write them (CC3M, CC12M): KEY.jpg with KEY.txt, KEY.json.

Members of one sample stand next to each other and share the name up to its first dot. A shard is one
tar; its pictures are called TAR/MEMBER, since keys may be repeated in another tar.
"""

import itertools
import json
import tarfile
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from data.sources import base

FILES = False


def shards(options: base.Options) -> list[base.Shard]:
    """One for each tar file in `options.images` or a folder of it, or that one tar."""
    return tar_shards("webdataset", options)


def read(shard: base.Shard) -> Iterator[base.Picture | base.Fault]:
    """The tar's pictures with their caption: the text beside them, else the JSON's `caption`."""
    return read_tar(shard, _entry)


def tar_shards(source: str, options: base.Options) -> list[base.Shard]:
    """Shards of `source`, one a tar."""
    root = epath.Path(options.images)
    if root.is_dir():
        paths = [*root.glob("*.tar"), *root.glob("*/*.tar")]
    else:
        paths = [root] if root.exists() and root.suffix == ".tar" else []
        root = root.parent
    if not paths:
        raise base.SourceError(f"--images {options.images}: got no .tar file, expected some in it")
    out = []
    for path in paths:
        prefix = path.relative_to(root).with_suffix("").as_posix()
        name = urllib.parse.quote(prefix, safe="")
        out.append(base.Shard(name, source, {"tar": str(path), "prefix": prefix}))
    return sorted(out, key=lambda shard: shard.name)


def read_tar(
    shard: base.Shard, entry: Callable[[str, dict[str, bytes]], base.Entry]
) -> Iterator[base.Picture | base.Fault]:
    """The tar's pictures as `entry` makes them of their name and the texts beside them.

    `entry` raises ValueError for what it cannot use.
    """
    name = f"{shard.arguments['prefix']}.tar"
    try:
        for key, files in _samples(epath.Path(shard.arguments["tar"])):
            image = f"{shard.arguments['prefix']}/{key}"
            if ".." in key.split("/"):
                yield base.Fault(image, "bad annotation", "expected a name without ..")
                continue
            ending = next((end for end in files if f".{end}".lower() in base.PICTURE_ENDINGS), None)
            if ending is None:
                got = ", ".join(files)
                yield base.Fault(image, "no picture", f"got {got}, expected a picture beside it")
                continue
            image = f"{image}.{ending}"
            try:
                found = entry(image, files)
            except ValueError as error:
                yield base.Fault(image, "bad annotation", str(error))
                continue
            yield base.join(found, files[ending])
    except FileNotFoundError:
        yield base.Fault(name, "no such file", f"there is no {shard.arguments['tar']}")
    except (tarfile.TarError, EOFError, OSError) as error:
        lost = "the sample before it and all behind it are lost"
        yield base.Fault(name, "damaged shard", f"{error}; {lost}")


def metadata(files: dict[str, bytes]) -> dict[str, Any]:
    """The sample's JSON; empty if it has none. Raises ValueError."""
    try:
        found = json.loads(files.get("json", b"{}"))
    except ValueError as error:
        raise ValueError(f"json: not JSON ({error}), expected an object") from None
    if not isinstance(found, dict):
        raise ValueError(f"json: got a {type(found).__name__}, expected an object")
    return found


class _Member(tarfile.TarInfo):
    """A member whose header must be right: tarfile takes a broken or missing one for the tar's end."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, expected a member or the tar's end") from None


def _samples(path: epath.Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, ending -> bytes) of each sample, the tar read once from front to end."""
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar:
        members = (
            (*_key(member.name), tar.extractfile(member).read())
            for member in tar
            if member.isfile()
        )
        for key, group in itertools.groupby(members, key=lambda member: member[0]):
            yield key, {ending: content for _, ending, content in group}


def _key(name: str) -> tuple[str, str]:
    """(key, ending) of a member: a/b.seg.png is ("a/b", "seg.png")."""
    folder, _, base_name = name.removeprefix("./").rpartition("/")
    stem, _, ending = base_name.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending


def _entry(image: str, files: dict[str, bytes]) -> base.Entry:
    if "txt" in files:
        caption = files["txt"].decode("utf-8", "replace")
    else:
        caption = metadata(files).get("caption")
    return base.Entry(image, (caption,))
