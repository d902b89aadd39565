"""The interface of a multimodal chat model: an image and a prompt in, an answer out.

`local_chat` runs one on this machine, `endpoint_chat` asks a server; both only import here what they need.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import PIL.Image


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


class Chat(Protocol):
    """A model, loaded or connected to."""

    def answer(
        self, images: Sequence[PIL.Image.Image], prompts: Sequence[str]
    ) -> list[Answer | Failure]:
        """One answer for each image with its prompt, in their order.

        Args:
          images: any number, of any size and mode; it is split into what fits.
          prompts: as many.
        """
        ...


def one_line(value: object, limit: int = 200) -> str:
    """A text or an exception on one line, cut to `limit` characters; control characters become U+FFFD."""
    text = str(value)[: 100 * limit]  # white space may be most of it
    text = " ".join(text.split()) or type(value).__name__
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
