"""Tar shards as img2dataset and webdataset write them (CC3M, CC12M): KEY.jpg with KEY.txt, KEY.json.

Members of one sample stand next to each other and share the name up to its first dot. A shard is one
tar; its images are called TAR/MEMBER, since keys may be repeated in another tar.
"""

import hashlib
import itertools
import json
import os
import re
import stat
import tarfile
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from etils import epath
from grain_jax.data.sources import base, join

from grain_jax.files import image_bounds

MAX_NAME = 255  # bytes of a part of a name: no file system takes more
MAX_PATH = 1024  # bytes of a name
MAX_FILES = 64  # of a sample
MAX_TEXT = 1 << 20  # bytes of a text or a JSON
_TEXTS = ("txt", "json")
_MAX_SHARD_NAME = 200  # characters of a shard's name, which becomes a file's
_UNWANTED = re.compile(
    "[\x00-\x1f\x7f\ud800-\udfff]"
)  # in a name: control characters, half surrogates
_HEADERS = (  # members that are part of the next one's header, read whole
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class WebDataset:
    """A `base.Source` of tars: images with their caption, the text beside them, else the JSON's `caption`.

    A subclass with another `entry` reads more of what stands beside an image.
    """

    images_are_files: ClassVar[bool] = False

    def shards(self, options: base.Options) -> list[base.Shard]:
        """One for each tar file in `options.images` or a folder of it, or that one tar."""
        return _tar_shards(options)

    def read(self, shard: base.Shard) -> Iterator[base.Image | base.Fault]:
        """The tar's images as `entry` makes them of their name and the files beside them."""
        return _read_tar(shard, self.entry)

    def entry(self, image: str, files: dict[str, bytes]) -> base.Entry:
        """What the files of a sample say of its image.

        Args:
          image: its name.
          files: ending -> content; of images only the first has its content.

        Raises:
          ValueError: they cannot be used; the message becomes the fault's detail.
        """
        if "txt" in files:
            caption = files["txt"].decode("utf-8", "replace")
        else:
            caption = metadata(files).get("caption")
        return base.Entry(image, (caption,))


def _tar_shards(options: base.Options) -> list[base.Shard]:
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
        name = urllib.parse.quote(prefix, safe="", errors="surrogateescape")
        if len(name) > _MAX_SHARD_NAME:
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]
            name = f"{name[: _MAX_SHARD_NAME - 17]}-{digest}"
        arguments = {"tar": str(path), "prefix": prefix, "orientation": options.orientation}
        out.append(base.Shard(name, arguments))
    return sorted(out, key=lambda shard: shard.name)


def _read_tar(
    shard: base.Shard, entry: Callable[[str, dict[str, bytes]], base.Entry]
) -> Iterator[base.Image | base.Fault]:
    name, seen = f"{shard.arguments['prefix']}.tar", set()
    samples = _samples(epath.Path(shard.arguments["tar"]))
    while True:
        try:
            key, files = next(samples, ("", None))
        except FileNotFoundError:
            yield base.Fault(name, "no such file", f"there is no {shard.arguments['tar']}")
            return
        except (
            Exception
        ) as error:  # tarfile also raises ValueError, IndexError, RecursionError, ...
            lost = "the sample before it and all behind it are lost"
            yield base.Fault(name, "damaged shard", f"{error or type(error).__name__}; {lost}")
            return
        if files is None:
            return
        image = f"{shard.arguments['prefix']}/{key}"
        yield _read_sample(image, files, entry, seen, shard.arguments["orientation"])


def _read_sample(
    image: str,
    files: dict[str, bytes | None],
    entry: Callable[[str, dict[str, bytes]], base.Entry],
    seen: set[str],
    orientation: str,
) -> base.Image | base.Fault:
    """A sample's image; `seen` are the names of those before it, and then its own too."""
    if ".." in image.split("/"):
        return base.Fault(image, "bad annotation", "expected a name without ..")
    ending = next(filter(_is_image, files), None)
    if ending is None:
        got = ", ".join(files)
        return base.Fault(image, "no picture", f"got {got:.200}, expected an image beside it")
    image = f"{image}.{ending}"
    if fault := _name_fault(image):
        return base.Fault(image, "bad annotation", fault)
    if image in seen:
        return base.Fault(image, "bad annotation", "the name is there twice, expected it once")
    seen.add(image)
    if None in files.values():
        most = f"{image_bounds.MAX_BYTES:,} bytes, {MAX_TEXT:,} of a text, and {MAX_FILES} files"
        return base.Fault(image, "too large", f"expected a sample of at most {most}")
    try:
        found = entry(image, files)
    except ValueError as error:
        return base.Fault(image, "bad annotation", str(error))
    return join.join(found, files[ending], orientation)


def _name_fault(image: str) -> str:
    """What is wrong with an image's name; "" if nothing is."""
    if _UNWANTED.search(image):
        return "expected a name in UTF-8 without control characters"
    longest = max(len(part.encode()) for part in image.split("/"))
    size = len(image.encode())
    if size > MAX_PATH or longest > MAX_NAME:
        return f"got a name of {size} bytes, expected at most {MAX_PATH}, and {MAX_NAME} a part"
    return ""


def metadata(files: dict[str, bytes]) -> dict[str, Any]:
    """The sample's JSON; empty if it has none. Raises ValueError."""
    try:
        found = json.loads(files.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json: not JSON ({error}), expected an object") from None
    if not isinstance(found, dict):
        raise ValueError(f"json: got a {type(found).__name__}, expected an object")
    return found


class _Member(tarfile.TarInfo):
    """A member with a strict check of its header: tarfile takes a broken or missing header for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            found = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, expected a member or the tar's end") from None
        if found.size < 0 or (found.type in _HEADERS and found.size > MAX_TEXT):
            raise tarfile.ReadError(f"a header says {found.size} bytes")
        return found


def _samples(path: epath.Path) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(key, ending -> bytes) of each sample, the tar read once from front to end.

    Only a sample's texts and its first image are read; the bytes are None where they are too many, or the
    files. Links, devices and sparse files are no part of a sample.
    """
    if "://" in str(path):
        length = path.stat().length
    else:  # epath's own asks for the owner's name, which a container may not know
        found = os.stat(path)
        length = found.st_size
        if not stat.S_ISREG(found.st_mode):
            raise tarfile.ReadError("not a regular file")
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar:
        members = (
            member for member in _within(tar, length) if member.isfile() and not member.issparse()
        )
        for key, group in itertools.groupby(members, key=lambda member: _key(member.name)[0]):
            files: dict[str, bytes | None] = {}
            for member in group:
                ending = _key(member.name)[1]
                most = MAX_TEXT if ending in _TEXTS else 0
                if _is_image(ending) and not any(map(_is_image, files)):
                    most = image_bounds.MAX_BYTES
                if len(files) == MAX_FILES:
                    ending, most = max(files), -1  # one of them says that there are too many
                files[ending] = b""
                if most:
                    fits = 0 <= member.size <= most
                    files[ending] = tar.extractfile(member).read() if fits else None
            yield key, files


def _within(tar: tarfile.TarFile, length: int) -> Iterator[tarfile.TarInfo]:
    """The members, up to the end of the file: tarfile would seek through the terabytes that a false header claims."""
    for member in tar:
        if tar.offset > length:
            raise tarfile.ReadError("unexpected end of data")
        yield member


def _is_image(ending: str) -> bool:
    return f".{ending}".lower() in base.IMAGE_ENDINGS


def _key(name: str) -> tuple[str, str]:
    """(key, ending) of a member: a/b.seg.png is ("a/b", "seg.png")."""
    folder, _, base_name = name.removeprefix("./").rpartition("/")
    stem, _, ending = base_name.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending
