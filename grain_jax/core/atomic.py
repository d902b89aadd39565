"""Writes a file as a whole or not at all: a process or a machine may stop between any two bytes."""

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Iterable

from etils import epath


def write_text(path: epath.PathLike, text: str) -> None:
    """Replaces the file by `text`, in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.PathLike, content: bytes, *, lasting: bool = True) -> None:
    """Replaces the file by `content`; a kill or a full disk leaves the old one, and nothing beside it.

    A device (/dev/null, /dev/stdout) is written to. A link elsewhere is replaced, not followed.

    Args:
      path: local or in an object store.
      content: the whole file.
      lasting: whether it waits for the disk, so that the file stays if the machine stops.

    Raises:
      OSError: it cannot be written.
    """
    path = epath.Path(path)
    if "://" in str(path):  # object stores replace whole objects, and some cannot rename
        path.write_bytes(content)
        return
    if is_special(path):
        with path.open("ab") as file:  # /dev/stdout may be a file with lines in it
            file.write(content)
        return
    new = _temporary(path)
    try:
        new.write_bytes(content)
        if lasting:
            replace(new, path)
        else:
            new.replace(path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def replace(new: epath.PathLike, path: epath.PathLike, old: epath.PathLike | None = None) -> None:
    """Renames a file, or a folder with all that is below, to `path` when its content is on the disk.

    Args:
      new: what takes the place of `path`.
      path: beside it; a store renames without waiting.
      old: where a folder at `path` goes first; None for a file.

    Raises:
      OSError: it cannot be written or renamed.
    """
    new, path = epath.Path(new), epath.Path(path)
    is_local = "://" not in str(path)
    if is_local:
        below = [folder / name for folder, _, names in new.walk() for name in (*names, "")]
        sync(below or [new])
    if old is not None and path.exists():
        path.rename(old)
    new.replace(path)
    if is_local:
        sync([path.absolute().parent])


def sync(paths: Iterable[epath.PathLike]) -> None:
    """Waits until these local files, and the names in local folders, are on the disk. Raises OSError."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems of networks cannot
                error.filename = str(path)
                raise
        finally:
            os.close(descriptor)


def digest(content: bytes) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits: what a mark notes so that damage shows."""
    return hashlib.sha256(content).hexdigest()


def check(path: epath.PathLike) -> None:
    """Raises OSError where `write_bytes` could not write; for commands that write hours later."""
    path = epath.Path(path)
    if "://" not in str(path) and not is_special(path):
        new = _temporary(path)
        new.write_bytes(b"")
        new.unlink(missing_ok=True)


def _temporary(path: epath.Path) -> epath.Path:
    """A name of its own for each writer: two may write the same file, and nobody has put a link there."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")


def is_special(path: epath.PathLike) -> bool:
    """Whether a local path is a device, or a link in /dev such as /dev/stdout: nothing is renamed over it."""
    if not str(epath.Path(path).absolute()).startswith(("/dev/", "/proc/")):
        return False
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
