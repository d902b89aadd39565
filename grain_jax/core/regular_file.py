"""Files that others wrote: regular ones alone, of bounded length, of a declared form, below a named folder.

epath's `is_file` is true of pipes and devices too, which can be read without end.
"""

import contextlib
import functools
import os
import posixpath
import stat
import unicodedata
from collections.abc import Iterator
from typing import IO, Any, TypeVar

import msgspec
from etils import epath

from grain_jax.core import errors

MAX_JSON = 64 << 20  # bytes of a JSON file that is read as a whole
T = TypeVar("T")


class FileError(errors.UserError):
    """A file of others cannot be read; one line: what, where, got, expected."""


def is_remote(path: epath.PathLike) -> bool:
    """Whether epath asks another machine for the path; of "/gs/bucket", too, which it takes for "gs://bucket"."""
    return "://" in str(epath.Path(path))


def length(path: epath.PathLike) -> int | None:
    """Bytes of the regular file at `path`, local or remote, links followed; None for a folder, pipe or device.

    Raises:
      OSError: there is nothing at the path.
    """
    path = epath.Path(path)
    if "://" in str(path):
        status = path.stat()
        return None if status.is_directory else status.length
    status = os.stat(path)  # epath's asks for the name of the owner, which a container may not know
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def is_one(path: epath.PathLike) -> bool:
    """Whether there is a regular file at the path."""
    try:
        return length(path) is not None
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def opened(path: epath.PathLike, expected: str, mode: str = "rb") -> Iterator[tuple[IO, int]]:
    """Opens a regular file, local or remote, for the block: (file, its bytes); "r" reads UTF-8.

    Raises:
      FileError: as `read`, whatever its size; or the block cannot read it.
    """
    path = epath.Path(path)
    try:
        size = length(path)
        if size is None:
            raise FileError(f"{path}: got a folder, pipe or device, expected {expected}")
        with path.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file, size
    except FileNotFoundError:
        raise FileError(f"{path}: no such file, expected {expected}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, errors.UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnicodeDecodeError):
            reason = "not UTF-8 text"
        raise FileError(f"{path}: {reason}, expected {expected}") from None


def read(path: epath.PathLike, most: int, expected: str) -> bytes:
    """The content of a regular file, local or remote.

    Args:
      path: the file; links are followed.
      most: bytes that it may have.
      expected: what it should be, for errors: "a tokenizer of `tokenizers`".

    Raises:
      FileError: there is none, it is no regular file (it is not opened then), too long, or cannot be read.
    """
    with opened(path, expected) as (file, size):
        if size > most:
            raise FileError(f"{path}: got {size:,} bytes, expected {expected} of at most {most:,}")
        return file.read(size)


def lines(path: epath.PathLike, expected: str, most: int = MAX_JSON) -> Iterator[bytes]:
    """The lines of a regular file with their ends, one after another.

    Raises:
      FileError: as `read`, whatever its size; a line of more than `most` bytes.
    """
    with opened(path, expected) as (file, _):
        remote = "://" in str(path)  # whose files take no bound of a line
        for line in file if remote else iter(functools.partial(file.readline, most + 1), b""):
            if len(line) > most:
                raise FileError(f"{path}: got a line of over {most:,} bytes, expected {expected}")
            yield line


def read_text(path: epath.PathLike, expected: str, most: int = MAX_JSON) -> str:
    """The text in a regular file. Raises FileError as `read`; also not UTF-8."""
    try:
        return read(path, most, expected).decode()
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path}: byte {error.start} is not of UTF-8 text, expected {expected}"
        ) from None


def read_json(path: epath.PathLike, kind: type[T], expected: str, most: int = MAX_JSON) -> T:
    """The JSON value in a regular file, of the form that `kind` declares; see `from_json`.

    Raises:
      FileError: as `read`; also not JSON, or of another form.
    """
    return from_json(read(path, most, expected), kind, str(path), expected)


def from_json(content: bytes | str, kind: type[T], where: str, expected: str) -> T:
    """The JSON value in `content`, checked against a declaration.

    Args:
      content: UTF-8.
      kind: any type that msgspec knows: a Struct, a dataclass, a NamedTuple, `dict[str, list[str]]`; bounds of
        numbers, lengths and texts by `Annotated[..., msgspec.Meta(...)]`. Keys that it does not declare are left out.
      where: the file, or the record in it, for errors.
      expected: what the value should be, for errors.

    Raises:
      FileError: not JSON (NaN and infinite numbers are none), nested too deep, or of another form.
    """
    with _of_form(where, expected):
        return msgspec.json.decode(content, type=kind)


def checked(value: Any, kind: type[T], where: str, expected: str) -> T:
    """A value that was read already, checked as `from_json` does. Raises FileError."""
    with _of_form(where, expected):
        return msgspec.convert(value, type=kind)


@contextlib.contextmanager
def _of_form(where: str, expected: str) -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise FileError(f"{where}: nested too deep, expected {expected}") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise FileError(f"{where}: {error}, expected {expected}") from None


def inside(name: str) -> str:
    """`name`, which a file gave, with / between its parts, normalised; "" where it leads out of any folder."""
    path = posixpath.normpath(name)
    outside = posixpath.isabs(path) or path.split("/")[0] == ".."
    return "" if outside or "\0" in name or "://" in name else path


def named(folder: epath.PathLike, name: str) -> epath.Path:
    """The path of a file's `name` in a folder; in another Unicode form where the folder has the name in that one alone.

    macOS and archives write "ü" as two characters (NFD), keyboards as one (NFC); on a screen both look the same.
    """
    folder = epath.Path(folder)
    if not name.isascii() and not (folder / name).exists():
        for form in ("NFC", "NFD"):
            if (path := folder / unicodedata.normalize(form, name)).exists():
                return path
    return folder / name


def below(folder: epath.PathLike, name: str, where: str) -> epath.Path:
    """The path of `name`, which a file gave, in a folder; of a local one the links are followed, too.

    Args:
      folder: local or remote.
      name: relative, with / between its parts.
      where: the file that gave the name, for errors.

    Raises:
      FileError: the path would be outside the folder, or is the folder.
    """
    relative = inside(name)
    path, fault = epath.Path(folder) / relative, relative in ("", ".")
    if not fault and "://" not in str(folder):
        real = os.path.realpath(folder)
        fault = not os.path.realpath(path).startswith(real.rstrip(os.sep) + os.sep)
    if fault:
        raise FileError(f"{where}: got the name {name[:200]!r}, expected a path below {folder}")
    return path
