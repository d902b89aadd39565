"""Writes the help of each command and the config keys for readers on GitHub: python docs/site/write.py"""

import os
import pathlib
import re
import textwrap
from unittest import mock

import commands
import config_keys

DOCS = pathlib.Path(__file__).resolve().parents[1]
COLUMNS = 100


def texts() -> dict[pathlib.Path, str]:
    """File -> its text, the same on every machine."""
    with mock.patch.dict(os.environ, COLUMNS=str(COLUMNS)):
        pages = {(DOCS / path).with_suffix(".txt"): text for path, text in commands.pages().items()}
    mark = re.compile(r"^#+ grain-jax .*\n\n```text\n|```\n|\n\Z", re.M)
    key = re.compile(r"^#### `(.*)` \{ #.*\n\n(.*)\n\n(.*)\n\{ \.facts \}", re.M)
    keys = key.sub(r"\1\n    \2\n    \3", config_keys.markdown())
    keys = re.sub(r"^## (.*)", r"\1\n" + "=" * 40, keys, flags=re.M)
    wrap = lambda line: textwrap.fill(line, COLUMNS, subsequent_indent="    ") + "\n"
    keys = "".join(map(wrap, re.sub(r"[`*]", "", keys).splitlines()))
    return {file: mark.sub("", text) for file, text in pages.items()} | {DOCS / "config_keys.txt": keys}


if __name__ == "__main__":
    for file, text in texts().items():
        file.write_text(text)
