"""Files that are whole or not there: a process may be killed between any two bytes that it writes."""

from etils import epath


def write_text(path: epath.Path, text: str) -> None:
    """Puts `text` in the place of the file; a kill leaves the old one."""
    if "://" in str(path):  # an object store replaces whole objects, and some cannot rename
        path.write_text(text)
        return
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)
