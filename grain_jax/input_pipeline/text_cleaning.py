"""Texts before the tokenizer: repair, the cleaning of each tower, and ids that are equal where texts are equal."""

import abc
import functools
import hashlib
import html
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ftfy
import numpy as np
import regex

from grain_jax.core import errors


class TokenizerError(errors.UserError):
    """The tokenizer cannot be built, or was given something that is not text."""


class Texts(NamedTuple):
    """N texts as tokens, without padding."""

    ids: np.ndarray  # int32 [sum(lengths)], text after text
    lengths: np.ndarray  # int32 [N], each 2 or more
    too_long: np.ndarray  # bool [N], the texts that were cut
    text_ids: np.ndarray  # int32 [N], equal where the cleaned texts are equal


class BaseTokenizer(abc.ABC):
    """What the tokenizers share.

    Attributes:
      cleaning: of the texts, a key of CLEANINGS.
      pad_id: the id of the padding.
      vocab_size: the highest id + 1.
    """

    cleaning = "lower"
    pad_id = 0
    vocab_size: int

    @functools.cached_property
    @abc.abstractmethod
    def special_ids(self) -> tuple[int, ...]:
        """In order, the ids that stand for no text."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens; what the cleaning dropped is lost.

        Raises:
          TokenizerError: an id is none of the tokenizer's.
        """

    def _text_ids_of(self, ids: Sequence[int]) -> list[int]:
        """The ids that stand for text. Raises TokenizerError."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise TokenizerError(f"ids: got {i}, expected 0 to {self.vocab_size - 1}")
        specials = set(self.special_ids)
        return [int(i) for i in ids if i not in specials]

    @abc.abstractmethod
    def encode(self, texts: Sequence[str | bytes], context_length: int) -> Texts:
        """The tokens of N strings (or UTF-8 bytes), cleaned here and cut to `context_length` tokens.

        Raises:
          TokenizerError: not texts, or they cannot be tokenised.
        """

    def __call__(self, texts: Sequence[str | bytes], context_length: int = 77) -> np.ndarray:
        """Returns i32[N, context_length], padded with `pad_id`. As `encode`; 2-D even for one text."""
        tokens = self.encode(texts, context_length)
        padded = np.full((len(tokens.lengths), context_length), self.pad_id, np.int32)
        padded[np.arange(context_length) < tokens.lengths[:, None]] = tokens.ids
        return padded

    def text_id(self, texts: Sequence[str | bytes]) -> np.ndarray:
        """Returns i32[N], equal where texts are equal after the cleaning. See `text_ids`."""
        return text_ids(clean_all(texts, self.cleaning))


def clean(text: str | bytes) -> str:
    """Returns `text` with mojibake, HTML entities and white space repaired, as the reference does.

    Case is kept: the tokenizer lowers it.

    Args:
      text: a string, or UTF-8 bytes (as tf.data gives).

    Raises:
      TokenizerError: `text` is neither, or the bytes are not UTF-8.
    """
    text = _text(text)
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to repair
        return " ".join(text.split()) if "  " in text else text.strip()
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip()


def text_ids(texts: Sequence[str]) -> np.ndarray:
    """Returns i32[N], equal where the (cleaned) texts are equal.

    The ids mask duplicates in the contrastive losses. They depend on the text alone (BLAKE2b, 32 bits), not on
    process, machine or PYTHONHASHSEED. Two different texts share an id with probability 2^-32, so among n
    different texts about n^2 / 2^33 pairs do: one in 33,000 batches of 512, one in 32 batches of 16,384. The
    loss leaves such a pair out of the negatives, no more.
    """
    digests = b"".join(
        hashlib.blake2b(text.encode("utf-8"), digest_size=4).digest() for text in texts
    )
    return np.frombuffer(digests, dtype="<i4").astype(np.int32)


def _text(text: str | bytes) -> str:
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"text {text[:40]!r} is not UTF-8 ({error.reason} at byte {error.start}); "
                "convert the records to UTF-8"
            ) from None
    elif not isinstance(text, str):
        raise TokenizerError(
            f"expected a text (str), got {type(text).__name__}: {str(text)[:40]}; "
            "pass a list of strings"
        )
    return text


def _whole(text: str | bytes) -> str:
    """As `_text`; halves of characters, which `clean` repairs, are refused."""
    text = _text(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TokenizerError(
            f"text {text[:40]!r} has half a character (a lone surrogate); expected Unicode"
        ) from None
    return text


def _canonical(text: str | bytes) -> str:
    """Lower case, without ASCII punctuation, single spaces: the cleaning of SigLIP's texts."""
    return " ".join(_whole(text).lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
CLEANINGS: dict[str, Callable[[str | bytes], str]] = {
    "lower": lambda text: clean(text).lower(),
    "canonical": _canonical,
    "none": _whole,
}


def clean_all(texts: Sequence[str | bytes], cleaning: str = "lower") -> list[str]:
    """The texts after the `cleaning`, a key of CLEANINGS. Raises TokenizerError."""
    if isinstance(texts, str | bytes):  # would be taken letter by letter
        raise TokenizerError(
            f"expected a list of texts, got one text {texts[:40]!r}; wrap it in []"
        )
    return [CLEANINGS[cleaning](text) for text in texts]
