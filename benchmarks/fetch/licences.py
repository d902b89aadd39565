"""Who made a file of a Debian package, and its licence, by the package's machine-readable copyright file (DEP-5)."""

import fnmatch
import re
from typing import NamedTuple


class Licence(NamedTuple):
    """What a paragraph of the copyright file says of a file."""

    name: str
    holders: str
    source: str  # the comment of the paragraph, most often an address
    pattern: str  # of the paragraph; "*": it is about every file that no other names


def read(text: str) -> list[Licence]:
    """The patterns of a copyright file, format 1.0, in their order."""
    found = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, list[str]] = {}
        name = ""
        for line in paragraph.splitlines():
            if line[:1] in (" ", "\t") and name:
                fields[name].append(line.strip())
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = [value.strip()] if value.strip() else []
        holders, source = ("; ".join(fields.get(key, [])) for key in ("Copyright", "Comment"))
        licence = fields.get("License", [""])[0]
        for pattern in " ".join(fields.get("Files", [])).split():
            found.append(Licence(licence, holders, source, pattern))
    return found


def of(path: str, known: list[Licence]) -> Licence | None:
    """The last that matches a file; endings are not compared, since packages store pictures in other formats."""
    stem = lambda path: re.sub(r"\.\w+\Z", "", path)
    matching = (x for x in reversed(known) if fnmatch.fnmatchcase(stem(path), stem(x.pattern)))
    return next(matching, None)
