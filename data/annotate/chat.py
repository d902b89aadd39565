"""What `local_chat` and `endpoint_chat`, the two kinds of multimodal chat models, say of an image and a prompt."""

from typing import NamedTuple

from grain_jax.core import printable

MAX_TOKENS = 256  # of an answer


class Failure(NamedTuple):
    """The reason why a model has no result for an image."""

    cause: str  # of a small fixed set, the name of a counter: "out of memory", "time-out", ...
    detail: str  # one line: what happened


class Answer(NamedTuple):
    """The answer of a model about an image."""

    text: str  # as it came; may be empty
    prompt_tokens: int  # the image's included; 0 where a server does not say
    answer_tokens: int  # 0 where a server does not say
    cut_off: bool  # the limit of tokens was reached, so that the last line may be unfinished


def one_line(value: object, limit: int = 200) -> str:
    """A text or an exception on one line, cut to `limit` characters; invisible ones become escapes."""
    text = str(value)[: 100 * limit]  # white space may be most of it
    return printable.plain(" ".join(text.split()) or type(value).__name__, limit)
