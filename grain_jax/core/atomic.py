"""Writes a file as a whole or not at all: a process may be killed between any two bytes."""

import os
import stat
import uuid

from etils import epath


def write_text(path: epath.PathLike, text: str) -> None:
    """Replaces the file by `text`, in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Replaces the file by `content`; a kill or a full disk leaves the old one, and nothing beside it.

    A device (/dev/null, /dev/stdout) is written to. A link elsewhere is replaced, not followed.

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
    new = _beside(path)
    try:
        new.write_bytes(content)
        new.replace(path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError):
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
    """Whether a local path is a device in /dev, or a link of it, such as /dev/stdout: nothing is renamed over it."""
    if not str(epath.Path(path).absolute()).startswith(("/dev/", "/proc/")):
        return False
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
