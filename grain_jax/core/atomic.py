"""Writes a file as a whole or not at all: a process may be killed between any two bytes."""

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator

from etils import epath


def write_text(path: epath.PathLike, text: str) -> None:
    """Replaces the file by `text`, in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Replaces the file by `content`; a kill or a full disk leaves the old one, and nothing beside it.

    Pipes, devices and what stands in /dev (/dev/null, /dev/stdout) are written to. A link elsewhere is replaced, not
    followed: it may be of a folder that somebody else made.

    Raises:
      OSError: it cannot be written; a pipe without a reader is an error, too.
    """
    path = epath.Path(path)
    if "://" in str(path):  # object stores replace whole objects, and some cannot rename
        path.write_bytes(content)
        return
    with _named(path):
        if is_special(path):
            write_special(path, content)
            return
        new = _beside(path)
        try:
            new.write_bytes(content)
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _named(path: epath.Path) -> Iterator[None]:
    """Errors inside name the file: those of `write` name none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def check(path: epath.PathLike) -> None:
    """Raises OSError where `write_bytes` could not make a file beside `path`; for commands that write it hours later."""
    path = epath.Path(path)
    if "://" not in str(path) and not is_special(path):
        new = _beside(path)
        new.write_bytes(b"")
        new.unlink(missing_ok=True)


def _beside(path: epath.Path) -> epath.Path:
    """A name of its own for each writer: two may write the same file, and nobody can have put a link there."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")


def is_special(path: epath.PathLike) -> bool:
    """Whether a local path is a pipe, a device, or stands in /dev or /proc: nothing can be renamed over it."""
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):
        return False
    if str(epath.Path(path).absolute()).startswith(("/dev/", "/proc/")):
        return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))


def write_special(path: epath.PathLike, content: bytes) -> None:
    """Writes to what `is_special`, without waiting for the reader of a pipe. Raises OSError."""
    # os.open, since `open` waits for a reader; appending, since /dev/stdout may be a file with lines in it.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
