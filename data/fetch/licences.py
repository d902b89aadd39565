"""Who made a file of a Debian package, and its licence, by the package's machine-readable copyright file (DEP-5)."""

import fnmatch
import re
from typing import NamedTuple


class Licence(NamedTuple):
    """What the copyright file says of a file; the last paragraph that matches counts."""

    name: str
    holders: str
    source: str  # the comment of the paragraph, most often an address
    pattern: str  # of the paragraph; "*": it is about every file that no other names


class Copyright:
    """A copyright file, format 1.0."""

    def __init__(self, text: str):
        """Reads the paragraphs that have `Files:`."""
        self._entries: list[tuple[str, Licence]] = []
        for paragraph in re.split(r"\n[ \t]*\n", text):
            fields = _fields(paragraph)
            for pattern in " ".join(fields.get("Files", [])).split():
                holders, source = (
                    "; ".join(fields.get(key, [])) for key in ("Copyright", "Comment")
                )
                licence = Licence(fields.get("License", [""])[0], holders, source, pattern)
                self._entries.append((pattern, licence))

    def of(self, path: str) -> Licence | None:
        """The licence of a file; endings are not compared, since packages store pictures in other formats."""
        found = None
        for pattern, licence in self._entries:
            if fnmatch.fnmatchcase(_stem(path), _stem(pattern)):
                found = licence
        return found


def _stem(path):
    return re.sub(r"\.\w+\Z", "", path)


def _fields(paragraph):
    fields, name = {}, ""
    for line in paragraph.splitlines():
        if line[:1] in (" ", "\t") and name:
            fields[name].append(line.strip())
        elif ":" in line:
            name, _, value = line.partition(":")
            fields[name] = [value.strip()] if value.strip() else []
    return fields
