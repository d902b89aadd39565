"""Files that others wrote: of bounded length, in a declared form, below a named folder."""

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
    """Whether epath asks another machine for the path; "/gs/bucket" is "gs://bucket" to it."""
    return "://" in str(epath.Path(path))


def length(path: epath.PathLike) -> int | None:
    """Bytes of the file at `path`, links followed; None for a folder, pipe or device. Raises OSError."""
    if is_remote(path):
        status = epath.Path(path).stat()
        return None if status.is_directory else status.length
    status = os.stat(path)  # epath's asks for the name of the owner, which a container may not know
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def is_one(path: epath.PathLike) -> bool:
    """Whether there is a file at the path."""
    try:
        return length(path) is not None
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def opened(path: epath.PathLike, expected: str) -> Iterator[tuple[IO, int]]:
    """Opens a file for the block: (file, its bytes). Raises FileError, also if the block cannot read."""
    path = epath.Path(path)
    try:
        if (size := length(path)) is None:
            raise FileError(f"{path}: got a folder, pipe or device, expected {expected}")
        with path.open("rb") as file:
            yield file, size
    except errors.UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        raise FileError(f"{path}: {reason}, expected {expected}") from None


def read(path: epath.PathLike, most: int, expected: str) -> bytes:
    """The content of a file of at most `most` bytes; `expected` says what it should be. Raises FileError."""
    with opened(path, expected) as (file, _):
        content = file.read(most + 1)
    if len(content) > most:
        raise FileError(f"{path}: got over {most:,} bytes, expected {expected} of at most {most:,}")
    return content


def lines(path: epath.PathLike, expected: str, most: int = MAX_JSON) -> Iterator[bytes]:
    """The lines of a file with their ends, of at most `most` bytes each. Raises FileError."""
    with opened(path, expected) as (file, _):
        # Remote files take no bound of a line.
        bounded = iter(functools.partial(file.readline, most + 1), b"")
        for line in file if is_remote(path) else bounded:
            if len(line) > most:
                raise FileError(f"{path}: got a line of over {most:,} bytes, expected {expected}")
            yield line


def read_text(path: epath.PathLike, expected: str, most: int = MAX_JSON) -> str:
    """The text in a file. Raises FileError, also if it is not UTF-8."""
    try:
        return read(path, most, expected).decode()
    except UnicodeDecodeError:
        raise FileError(f"{path}: not UTF-8 text, expected {expected}") from None


def read_json(path: epath.PathLike, kind: type[T], expected: str, most: int = MAX_JSON) -> T:
    """The JSON value in a file, of the form that `kind` declares. Raises FileError."""
    return from_json(read(path, most, expected), kind, str(path), expected)


def from_json(content: bytes | str, kind: type[T], where: str, expected: str) -> T:
    """The JSON value in `content`, checked against a declaration.

    Args:
      content: UTF-8.
      kind: any type that msgspec knows; keys that it does not declare are left out.
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
    """`name`, which a file gave, normalised; "" if it leads out of any folder."""
    path = posixpath.normpath(name)
    outside = posixpath.isabs(path) or path.split("/")[0] == ".."
    return "" if outside or "\0" in name or "://" in name else path


def named(folder: epath.PathLike, name: str) -> epath.Path:
    """The path of a file's `name` in a folder; in another Unicode form if the folder has only that one.

    macOS and archives write "ü" as two characters (NFD), keyboards as one (NFC); both look the same.
    """
    folder = epath.Path(folder)
    if not name.isascii() and not (folder / name).exists():
        for form in ("NFC", "NFD"):
            if (path := folder / unicodedata.normalize(form, name)).exists():
                return path
    return folder / name


def below(folder: epath.PathLike, name: str, where: str) -> epath.Path:
    """The path of `name`, which the file `where` gave, in a folder.

    Raises:
      FileError: the path is the folder or leads out of it, also over a link of a local folder.
    """
    relative = inside(name)
    path, fault = epath.Path(folder) / relative, relative in ("", ".")
    if not fault and "://" not in str(folder):
        real = os.path.realpath(folder)
        fault = not os.path.realpath(path).startswith(real.rstrip(os.sep) + os.sep)
    if fault:
        raise FileError(f"{where}: got the name {name[:200]!r}, expected a path below {folder}")
    return path
