"""Prompt files: a line `version: N`, then the text. The version is recorded in the output and not sent to the model."""

import re
from typing import NamedTuple

from etils import epath

from grain_jax.core import regular_file

FOLDER = epath.Path(__file__).parent / "prompts"
CAPTION = FOLDER / "caption.txt"
DESCRIBE = FOLDER / "describe.txt"
SUBJECT = "{subject}"  # stands in the second prompt for what the first one found


class Prompt(NamedTuple):
    """A prompt and the version that its file names."""

    version: int
    text: str

    def about(self, subject: str) -> str:
        """The second prompt's text for a subject."""
        return self.text.replace(SUBJECT, subject)  # not str.format: it may have other braces


def read_prompt(path: epath.PathLike, *, with_subject: bool) -> Prompt:
    """Reads a prompt.

    Args:
      path: the file, local or remote.
      with_subject: whether the text must have a place for the subject, as the second prompt must; the
        first one must not.

    Raises:
      FileError: no such file, no version, no text, or a place for the subject missing or too many.
    """
    content = regular_file.read_text(path, f"a prompt; make one like {CAPTION}")
    first, _, text = content.partition("\n")
    text = text.strip()
    version = re.fullmatch(r"version: *(\d+)\s*", first)
    fault = ""
    if version is None:
        fault = f"the first line is {first[:40]!r}, expected `version: N`, N a number"
    elif not text:
        fault = "no text after the first line, expected the prompt"
    elif (SUBJECT in text) != with_subject:
        got, expected = ("no", "one") if with_subject else ("a", "none")
        fault = f"got {got} {SUBJECT} in the text, expected {expected}"
    if fault:
        raise regular_file.FileError(f"{path}: {fault}")
    return Prompt(int(version.group(1)), text)
