"""What is asked of a multimodal chat model, and what it answers; `local_models` and `endpoint_chat` are the two kinds."""

from typing import NamedTuple

from etils import epath

from grain_jax.core import printable, regular_file

MAX_TOKENS = 256  # of an answer
PROMPTS = epath.Path(__file__).parent / "prompts"
SUBJECT = "{subject}"  # in the second prompt: the subject that the first answer names


class Failure(NamedTuple):
    """The reason why a model has no result for an image."""

    cause: str  # one of a few names, which counters have: "out of memory", "time-out", ...
    detail: str  # one line: what happened


class Answer(NamedTuple):
    """The answer of a model about an image."""

    text: str  # as the model gave it; may be empty
    cut_off: bool  # the limit of tokens was reached, so the last line may be unfinished


def read_prompts(folder: epath.PathLike) -> dict[str, str]:
    """The prompts in `caption.txt` and `describe.txt`. Raises FileError: {subject} is missing in the second, ..."""
    prompts = {}
    for name in ("caption", "describe"):
        path = epath.Path(folder) / f"{name}.txt"
        prompts[name] = regular_file.read_text(path, "a prompt").strip()
        if not prompts[name] or (SUBJECT in prompts[name]) != (name == "describe"):
            expected = f"a text {'with' if name == 'describe' else 'without'} {SUBJECT}"
            raise regular_file.FileError(f"{path}: got {prompts[name][:80]!r}, expected {expected}")
    return prompts


def one_line(value: object, limit: int = 200) -> str:
    """A text or an exception on one line of at most `limit` characters, with escapes for invisible ones."""
    text = str(value)[: 100 * limit]  # most of it may be white space
    return printable.plain(" ".join(text.split()) or type(value).__name__, limit)
