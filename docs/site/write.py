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
    files = {}
    with mock.patch.dict(os.environ, COLUMNS=str(COLUMNS)):
        for path, page in commands.pages().items():
            text = re.sub(r"^#+ grain-jax .*\n\n```text\n|```\n", "", page, flags=re.M)
            files[(DOCS / path).with_suffix(".txt")] = text.strip() + "\n"
    keys = re.sub(r"^#### `(.*)` \{ #.*\n\n(.*)\n\n(.*)\n\{ \.facts \}", r"\1\n    \2\n    \3",
                  config_keys.markdown(), flags=re.M)  # fmt: skip
    keys = re.sub(r"^## (.*)", r"\1\n" + "=" * 40, keys, flags=re.M)
    lines = re.sub(r"[`*]", "", keys).splitlines()
    wrapped = [
        x for line in lines for x in textwrap.wrap(line, COLUMNS, subsequent_indent="    ") or [""]
    ]
    files[DOCS / "config_keys.txt"] = "\n".join(wrapped) + "\n"
    return files


if __name__ == "__main__":
    for file, text in texts().items():
        file.write_text(text)
