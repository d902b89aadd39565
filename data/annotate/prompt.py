"""Prompt files: a line `version: N`, then the text. The version is recorded in the output and not sent to the model."""

import re
from typing import NamedTuple

from etils import epath

from grain_jax import errors
from grain_jax.files import regular_file

FOLDER = epath.Path(__file__).parent / "prompts"
CAPTION = FOLDER / "caption.txt"
DESCRIBE = FOLDER / "describe.txt"
SUBJECT = "{subject}"  # stands in the second prompt for what the first one found


class PromptError(errors.UserError):
    """A prompt's file cannot be used."""


class Prompt(NamedTuple):
    """A prompt and the version that its file names."""

    version: int
    text: str


def read_prompt(path: epath.PathLike, *, with_subject: bool) -> Prompt:
    """Reads a prompt.

    Args:
      path: the file, local or remote.
      with_subject: whether the text must have a place for the subject, as the second prompt must; the
        first one must not.

    Raises:
      PromptError: no such file, no version, no text, or a place for the subject missing or too many.
    """
    path = epath.Path(path)
    try:
        content = regular_file.read_text(path, f"a prompt; make one like {CAPTION}")
    except regular_file.FileError as error:
        raise PromptError(str(error)) from None
    first, _, text = content.partition("\n")
    text = text.strip()
    version = re.fullmatch(r"version: *(\d+)\s*", first)
    if version is None:
        got = first[:40]
        raise PromptError(f"{path}: the first line is {got!r}, expected `version: N`, N a number")
    if not text:
        raise PromptError(f"{path}: no text after the first line, expected the prompt")
    if (SUBJECT in text) != with_subject:
        got, expected = ("no", "one") if with_subject else ("a", "none")
        raise PromptError(f"{path}: got {got} {SUBJECT} in the text, expected {expected}")
    return Prompt(int(version.group(1)), text)


def about(prompt: Prompt, subject: str) -> str:
    """The second prompt's text for a subject."""
    return prompt.text.replace(SUBJECT, subject)  # not str.format: a prompt may have other braces
