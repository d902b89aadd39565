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
    version = re.fullmatch(r"version: *(\d+)\s*", first)
    if version is None or not text.strip() or (SUBJECT in text) != with_subject:
        got = f"got {first[:40]!r} and {len(text)} characters {'with' if SUBJECT in text else 'without'} {SUBJECT}"
        expected = f"`version: N`, then a text {'with' if with_subject else 'without'} {SUBJECT}"
        raise regular_file.FileError(f"{path}: {got}, expected {expected}")
    return Prompt(int(version[1]), text.strip())
