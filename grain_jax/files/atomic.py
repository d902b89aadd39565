"""Files that are whole or not there: a process may be killed between any two bytes that it writes."""

from etils import epath


def write_text(path: epath.Path, text: str) -> None:
    """Puts `text` in the place of the file; a kill leaves the old one."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Puts `content` in the place of the file; a kill leaves the old one."""
    if "://" in str(path):  # an object store replaces whole objects, and some cannot rename
        path.write_bytes(content)
        return
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)
