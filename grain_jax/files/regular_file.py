"""Regular files: epath's `is_file` is true of pipes and devices too, which can be read without end."""

import os
import stat

from etils import epath


def length(path: epath.PathLike) -> int | None:
    """Bytes of the regular file at `path`, local or remote, links followed; None for a folder, pipe or device.

    Raises:
      OSError: there is nothing at the path.
    """
    path = epath.Path(path)
    if "://" in str(path):
        found = path.stat()
        return None if found.is_directory else found.length
    found = os.stat(path)  # epath's asks for the name of the owner, which a container may not know
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def is_one(path: epath.PathLike) -> bool:
    """Whether there is a regular file at the path."""
    try:
        return length(path) is not None
    except (OSError, ValueError):
        return False
