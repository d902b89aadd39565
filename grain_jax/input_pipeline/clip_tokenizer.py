"""CLIP's tokenizer: byte pairs, whole batches at a time. Its ids equal those of the reference on every text tried.

Two libraries can merge the pairs; which of them is installed changes the speed, never the ids.
"""

import functools
import gzip
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import regex
from etils import epath

from grain_jax.input_pipeline.text_cleaning import (
    BaseTokenizer,
    Texts,
    TokenizerError,
    clean_all,
    text_ids,
)

if TYPE_CHECKING:
    import tokenizers

VOCAB_SIZE = 49408
START_OF_TEXT = 49406
END_OF_TEXT = 49407
PAD = 0  # also the id of "!": lengths, not ids, tell padding from text
_VOCABULARY = epath.Path(__file__).with_name("clip_vocabulary.txt.gz")

_END_OF_WORD = "</w>"
SPECIAL = {"<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}
# Names that either library may read as a special token in an ordinary text.
_SPECIAL_NAMES = (*SPECIAL, "<start_of_text>", "<end_of_text>")
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_OR_SPECIAL = regex.compile(
    "|".join([*map(regex.escape, SPECIAL), WORD]), flags=regex.IGNORECASE
)


class ClipTokenizer(BaseTokenizer):
    """CLIP's tokenizer, 49,408 ids.

    Args:
      backend: "huggingface" (package tokenizers) or "instant" (package instant-clip-tokenizer, faster).
        None takes "instant" where it is installed; the ids are equal.

    Raises:
      TokenizerError: there is no such backend, or it is not installed.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, backend: str | None = None):
        if backend is None:
            backend = "instant" if _installed("instant_clip_tokenizer") else "huggingface"
        if backend not in _BACKENDS:
            raise TokenizerError(f"tokenizer backend {backend!r}: expected one of {[*_BACKENDS]}")
        self.backend = backend
        self._tokenize, self._word_ids = _BACKENDS[backend]()

    def encode(self, texts: Sequence[str | bytes], context_length: int) -> Texts:
        """Tokenizes texts without padding.

        Each text is start token, tokens, end token; a longer one is cut to `context_length`
        tokens, the last of them the end token.

        Args:
          texts: N strings (or UTF-8 bytes), cleaned and lowered here.
          context_length: most tokens a text, specials included; 3 or more.
        """
        if context_length < 3:
            raise TokenizerError(
                f"context_length {context_length}: expected 3 or more (start, a token, end)"
            )
        cleaned = clean_all(texts)
        # Texts with the name of a special token: word by word, with the pattern of the reference.
        special = [
            i for i, t in enumerate(cleaned) if "<" in t and any(n in t for n in _SPECIAL_NAMES)
        ]
        spelt = {i: self._spell(cleaned[i], context_length + 1) for i in special}
        # One position more, so that a text that just fits differs from one that does not.
        padded = self._tokenize(
            ["" if i in spelt else t for i, t in enumerate(cleaned)], context_length + 1
        )
        # Each row has one end token, the last token.
        lengths = (padded == END_OF_TEXT).argmax(axis=1).astype(np.int32) + 1
        for i, ids in spelt.items():
            padded[i, : len(ids)] = ids
            padded[i, len(ids) :] = PAD
            lengths[i] = len(ids)
        too_long = lengths > context_length
        padded[too_long, context_length - 1] = END_OF_TEXT
        lengths = np.minimum(lengths, context_length)
        real = np.arange(padded.shape[1]) < lengths[:, None]
        return Texts(padded[real].astype(np.int32), lengths, too_long, text_ids(cleaned))

    def decode(self, ids: Sequence[int]) -> str:
        """As `BaseTokenizer.decode`: words with a space after each, as transformers' CLIPTokenizer writes them."""
        pieces = _pieces()
        whole = b"".join(pieces[i] for i in self._text_ids_of(ids))
        return whole.decode("utf-8", "replace").strip()

    special_ids = (START_OF_TEXT, END_OF_TEXT)

    def _spell(self, text: str, most: int) -> list[int]:
        ids = [START_OF_TEXT]
        for word in _WORD_OR_SPECIAL.findall(text):
            ids.extend([SPECIAL[word]] if word in SPECIAL else self._word_ids(word))
        return [*ids[: most - 1], END_OF_TEXT]


# A backend: texts, context length -> ids [N, context_length]; and one word -> its ids.
_Functions = tuple[Callable[[list[str], int], np.ndarray], Callable[[str], Sequence[int]]]


def _instant() -> _Functions:
    if not _installed("instant_clip_tokenizer"):
        raise TokenizerError(
            "tokenizer backend 'instant' needs `pip install 'grain_jax[fast-tokenizer]'` (Python 3.12 "
            "or older); elsewhere use 'huggingface'"
        )
    import instant_clip_tokenizer

    library = instant_clip_tokenizer.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]: a Rust module

    def tokenize(texts: list[str], context_length: int) -> np.ndarray:
        return library.tokenize_batch(texts, context_length=context_length)

    # The special names of the library do not match `WORD`, so no word is mistaken for one.
    return tokenize, library.encode


def _huggingface() -> _Functions:
    library = byte_pairs()

    def tokenize(texts: list[str], context_length: int) -> np.ndarray:
        padded = np.full((len(texts), context_length), PAD, dtype=np.uint16)
        padded[:, 0] = START_OF_TEXT
        for row, encoding in zip(padded, library.encode_batch_fast(texts), strict=True):
            ids = encoding.ids[: context_length - 2]
            row[1 : len(ids) + 1] = ids
            row[len(ids) + 1] = END_OF_TEXT
        return padded

    return tokenize, lambda word: library.encode(word).ids


_BACKENDS: dict[str, Callable[[], _Functions]] = {"huggingface": _huggingface, "instant": _instant}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _bytes() -> dict[str, int]:
    """The printable characters that stand for the 256 bytes, in the order of the first 256 ids of CLIP (and GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(code): code for code in printable}
    return found | {chr(256 + i): byte for i, byte in enumerate(others)}


def _tokens() -> tuple[list[str], list[tuple[str, str]]]:
    """(the tokens in the order of their ids, the merges); a token that ends a word ends in "</w>"."""
    # Their source is told in clip_vocabulary.LICENSE.txt.
    _, *lines = gzip.decompress(_VOCABULARY.read_bytes()).decode("utf-8").splitlines()
    merges = [(left, right) for left, right in map(str.split, lines)]
    characters = [*_bytes()]
    merged = ("".join(pair) for pair in merges)
    return [*characters, *(c + _END_OF_WORD for c in characters), *merged, *SPECIAL], merges


@functools.cache
def _pieces() -> list[bytes]:
    """What each id writes."""
    tokens, _ = _tokens()
    values = _bytes()
    write = lambda token: bytes(values[c] for c in token.removesuffix(_END_OF_WORD))
    return [write(t) + b" " * t.endswith(_END_OF_WORD) for t in tokens]


def byte_pairs() -> "tokenizers.Tokenizer":
    """CLIP's words and merges as a tokenizer of the package tokenizers, which neither cleans nor adds ids."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    tokens, merges = _tokens()
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=_END_OF_WORD,
        )
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return library
