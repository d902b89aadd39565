"""What a multimodal chat model is asked and answers; `local_models` and `endpoint_chat` are the two kinds."""

from typing import NamedTuple

from etils import epath

from grain_jax.core import printable

MAX_TOKENS = 256  # of an answer
SUBJECT = "{subject}"  # in the second prompt: the subject that the first answer names


class Failure(NamedTuple):
    """The reason why a model has no result for an image."""

    cause: str  # one of a few names, which counters have: "out of memory", "time-out", ...
    detail: str  # one line: what happened


class Answer(NamedTuple):
    """The answer of a model about an image."""

    text: str  # as the model gave it; may be empty
    cut_off: bool  # the limit of tokens was reached, so the last line may be unfinished


def prompt(name: str) -> str:
    """The prompt of the pass "caption" or "describe"."""
    return (epath.Path(__file__).parent / "prompts" / f"{name}.txt").read_text().strip()


def one_line(value: object, limit: int = 200) -> str:
    """A text or an exception on one line of at most `limit` characters, with escapes for invisible ones."""
    text = str(value)[: 100 * limit]  # most of it may be white space
    return printable.plain(" ".join(text.split()) or type(value).__name__, limit)
