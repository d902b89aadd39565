"""What may be read as a file: epath's `is_file` says yes to pipes and devices, which are read without end."""

import os
import stat

from etils import epath


def length(path: epath.PathLike) -> int | None:
    """Bytes of the regular file at `path` (links are followed, remote ones too); None where it is none.

    Raises:
      OSError: there is nothing.
    """
    path = epath.Path(path)
    if "://" in str(path):
        found = path.stat()
        return None if found.is_directory else found.length
    found = os.stat(path)  # epath's own asks for the owner's name, which a container may not know
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def is_one(path: epath.PathLike) -> bool:
    """Whether there is a regular file."""
    try:
        return length(path) is not None
    except (OSError, ValueError):
        return False
