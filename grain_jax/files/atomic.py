"""Writes a file as a whole or not at all: a process may be killed between any two bytes."""

from etils import epath


def write_text(path: epath.Path, text: str) -> None:
    """Replaces the file by `text`; a kill leaves the old one."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Replaces the file by `content`; a kill leaves the old one."""
    if "://" in str(path):  # object stores replace whole objects, and some cannot rename
        path.write_bytes(content)
        return
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)
