"""Texts before the tokenizer: repair, the cleaning of each tower, and ids that are equal if texts are."""

import hashlib
import html
import string
from collections.abc import Callable, Sequence

import ftfy
import numpy as np
import regex

from grain_jax.core import errors


class TokenizerError(errors.UserError):
    """The tokenizer cannot be built, or got something that is not text."""


def clean(text: str | bytes) -> str:
    """`text` with mojibake, HTML entities and white space repaired, as in the reference; case is kept.

    Args:
      text: a string, or UTF-8 bytes (as tf.data gives).

    Raises:
      TokenizerError: `text` is neither, or the bytes are not UTF-8.
    """
    text = _decoded(text)
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to repair
        return " ".join(text.split()) if "  " in text else text.strip()
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip()


def text_ids(texts: Sequence[str]) -> np.ndarray:
    """Returns i32[N], equal where the (cleaned) texts are equal.

    The ids mask duplicates in the contrastive losses. They depend on the text alone (BLAKE2b, 32 bits), not
    on process, machine or PYTHONHASHSEED. Two different texts share an id with probability 2^-32, so n
    different texts have about n^2 / 2^33 such pairs: one in 32 batches of 16,384. The loss then leaves the
    pair out of the negatives.
    """
    hashes = (hashlib.blake2b(text.encode("utf-8"), digest_size=4) for text in texts)
    return np.frombuffer(b"".join(x.digest() for x in hashes), dtype="<i4").astype(np.int32)


def _decoded(text: str | bytes) -> str:
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"text {text[:40]!r} is not UTF-8 ({error.reason} at byte {error.start});"
                " convert the records to UTF-8"
            ) from None
    if not isinstance(text, str):
        got = f"{type(text).__name__}: {str(text)[:40]}"
        raise TokenizerError(f"expected a text (str), got {got}; pass a list of strings")
    return text


def _valid(text: str | bytes) -> str:
    """As `_decoded`, with a question mark for half a character (a lone surrogate)."""
    return _decoded(text).encode(errors="replace").decode()


def _canonical(text: str | bytes) -> str:
    """Spaces for "_", no ASCII punctuation, lower case, single spaces: open_clip's `canonicalize_text`."""
    return " ".join(_valid(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


def _siglip(text: str | bytes) -> str:
    """Lower case, no ASCII punctuation, single spaces, as `SiglipTokenizer` of transformers."""
    return " ".join(_valid(text).lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
CLEANINGS: dict[str, Callable[[str | bytes], str]] = {
    "lower": lambda text: clean(text).lower(),
    "canonical": _canonical,
    "siglip": _siglip,
    # `Siglip2Tokenizer` of transformers; character by character, as its library
    "siglip2": lambda text: "".join(map(str.lower, _valid(text))),
    "none": _valid,
}


def clean_all(texts: Sequence[str | bytes], cleaning: str = "lower") -> list[str]:
    """The texts after the `cleaning`, a key of CLEANINGS. Raises TokenizerError."""
    if isinstance(texts, str | bytes):  # would be taken letter by letter
        raise TokenizerError(f"expected a list of texts, got one text {texts[:40]!r}; wrap it in []")
    return list(map(CLEANINGS[cleaning], texts))
