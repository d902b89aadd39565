"""Tar shards as img2dataset and webdataset write them (CC3M, CC12M): KEY.jpg with KEY.txt, KEY.json.

Members of one sample stand next to each other and share the name up to its first dot. A shard is one
tar; its images are called TAR/MEMBER, since keys may be repeated in another tar.
"""

import hashlib
import itertools
import json
import re
import tarfile
import urllib.parse
from collections.abc import Iterator
from typing import Any, ClassVar

from etils import epath

from grain_jax.core import image_bounds, regular_file
from grain_jax.data.sources import base, join

MAX_NAME = 255  # bytes of a part of a name: no file system takes more
MAX_PATH = 1024  # bytes of a name
MAX_FILES = 64  # of a sample
MAX_TEXT = 1 << 20  # bytes of a text or a JSON
_TEXTS = ("txt", "json")
_MAX_SHARD_NAME = 200  # characters of a shard's name, which becomes a file's
# In a name: control characters, half surrogates.
_UNWANTED = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
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

    def shards(self, options: base.Options) -> list[base.SourceShard]:
        """One for each tar file in `options.images` or a folder of it, or that one tar."""
        root = epath.Path(options.images)
        if root.is_dir():
            paths = [*root.glob("*.tar"), *root.glob("*/*.tar")]
        else:
            paths = [root] if root.exists() and root.suffix == ".tar" else []
            root = root.parent
        if not paths:
            raise base.SourceError(f"--images {options.images}: got no .tar file, expected some")
        out = []
        for path in paths:
            prefix = path.relative_to(root).with_suffix("").as_posix()
            name = urllib.parse.quote(prefix, safe="", errors="surrogateescape")
            if len(name) > _MAX_SHARD_NAME:
                digest = hashlib.sha256(name.encode()).hexdigest()[:16]
                name = f"{name[: _MAX_SHARD_NAME - 17]}-{digest}"
            arguments = {"tar": str(path), "prefix": prefix}
            out.append(base.SourceShard(name, arguments))
        return sorted(out, key=lambda shard: shard.name)

    def read(self, shard: base.SourceShard) -> Iterator[base.Image | base.Fault]:
        """The tar's images as `entry` makes them of their name and the files beside them."""
        prefix, seen = shard.arguments["prefix"], set()
        for found in _samples(epath.Path(shard.arguments["tar"]), prefix):
            if isinstance(found, base.Fault):
                yield found
            else:
                yield self._sample(*found, seen)

    def _sample(
        self, image: str, files: dict[str, bytes | None], seen: set[str]
    ) -> base.Image | base.Fault:
        """A sample's image; `seen` are the names of those before it, and then its own too."""
        ending = next(filter(_is_image, files), None)
        if ".." in image.split("/"):
            return base.Fault(image, "bad annotation", "expected a name without ..")
        if ending is None:
            got = ", ".join(files)
            return base.Fault(image, "no picture", f"got {got:.200}, expected an image beside it")
        image = f"{image}.{ending}"
        if fault := _name_fault(image, seen):
            return base.Fault(image, "bad annotation", fault)
        seen.add(image)
        if None in files.values():
            most = f"{image_bounds.MAX_BYTES:,} bytes, {MAX_TEXT:,} of a text, {MAX_FILES} files"
            return base.Fault(image, "too large", f"expected a sample of at most {most}")
        try:
            found = self.entry(image, files)
        except ValueError as error:
            return base.Fault(image, "bad annotation", str(error))
        return join.join(found, files[ending])

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


def _name_fault(image: str, seen: set[str]) -> str:
    """What is wrong with an image's name; "" if nothing is."""
    if image in seen:
        return "the name is there twice, expected it once"
    if _UNWANTED.search(image):
        return "expected a name in UTF-8 without control characters"
    longest = max(len(part.encode()) for part in image.split("/"))
    size = len(image.encode())
    if size > MAX_PATH or longest > MAX_NAME:
        return f"got a name of {size} bytes, expected at most {MAX_PATH}, and {MAX_NAME} a part"
    return ""


def metadata(files: dict[str, bytes]) -> dict[str, Any]:
    """The sample's JSON, in which img2dataset has NaN, too; empty if there is none. Raises ValueError."""
    try:
        found = json.loads(files.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json: not JSON ({error}), expected an object") from None
    return regular_file.checked(found, dict[str, Any], "json", "an object")


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


def _samples(
    path: epath.Path, prefix: str
) -> Iterator[tuple[str, dict[str, bytes | None]] | base.Fault]:
    """(PREFIX/KEY, ending -> bytes) of each sample, the tar read once from front to end; at last what is wrong with it.

    Only a sample's texts and its first image are read; the bytes are None where they are too many, or the
    files. Links, devices and sparse files are no part of a sample.
    """
    try:
        length = regular_file.length(path)
        if length is None:
            raise tarfile.ReadError("not a regular file")
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar:
            members = filter(_is_content, _within(tar, length))
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
                yield f"{prefix}/{key}", files
    except FileNotFoundError:
        yield base.Fault(f"{prefix}.tar", "no such file", f"there is no {path}")
    except Exception as error:  # tarfile also raises ValueError, IndexError, RecursionError
        lost = "the sample before it and all behind it are lost"
        detail = f"{error or type(error).__name__}; {lost}"
        yield base.Fault(f"{prefix}.tar", "damaged shard", detail)


def _is_content(member: tarfile.TarInfo) -> bool:
    return member.isfile() and not member.issparse()


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
