"""What is asked of a multimodal chat model, and what it answers; `local_models` and `endpoint_chat` are the two kinds."""

import re
from typing import NamedTuple

from etils import epath

from grain_jax.core import printable, regular_file

MAX_TOKENS = 256  # of an answer
PROMPTS = epath.Path(__file__).parent / "prompts"
_SUBJECT = "{subject}"  # in the second prompt: the subject that the first answer names


class Prompt(NamedTuple):
    """A prompt and the version that its file names, which is recorded and not sent to the model."""

    version: int
    text: str

    def about(self, subject: str) -> str:
        """The text of the second prompt for a subject."""
        return self.text.replace(
            _SUBJECT, subject
        )  # not str.format: the text may have other braces


class Failure(NamedTuple):
    """The reason why a model has no result for an image."""

    cause: str  # one of a few names, which counters have: "out of memory", "time-out", ...
    detail: str  # one line: what happened


class Answer(NamedTuple):
    """The answer of a model about an image."""

    text: str  # as the model gave it; may be empty
    prompt_tokens: int  # the image counts too; 0 if a server does not count
    answer_tokens: int  # 0 if a server does not count
    cut_off: bool  # the limit of tokens was reached, so the last line may be unfinished


def read_prompt(folder: epath.PathLike, name: str) -> Prompt:
    """Reads `caption.txt` or `describe.txt`: a line `version: N`, then the text, which has {subject} in the second.

    Raises:
      FileError: no such file, no version or text, or {subject} is missing or not expected.
    """
    path, with_subject = epath.Path(folder) / f"{name}.txt", name == "describe"
    content = regular_file.read_text(path, f"a prompt; make one like {PROMPTS / path.name}")
    first, _, text = content.partition("\n")
    version = re.fullmatch(r"version: *(\d+)\s*", first)
    if version is None or not text.strip() or (_SUBJECT in text) != with_subject:
        expected = f"`version: N`, then a text {'with' if with_subject else 'without'} {_SUBJECT}"
        raise regular_file.FileError(f"{path}: got {content[:80]!r}, expected {expected}")
    return Prompt(int(version[1]), text.strip())


def one_line(value: object, limit: int = 200) -> str:
    """A text or an exception on one line of at most `limit` characters, with escapes for invisible ones."""
    text = str(value)[: 100 * limit]  # most of it may be white space
    return printable.plain(" ".join(text.split()) or type(value).__name__, limit)
