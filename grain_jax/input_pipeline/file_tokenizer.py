"""Tokenizers in files: Hugging Face's tokenizer.json and SentencePiece's .model."""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from etils import epath

from grain_jax.core import regular_file
from grain_jax.input_pipeline.text_cleaning import (
    BaseTokenizer,
    Texts,
    TokenizerError,
    clean_all,
    text_ids,
)

MAX_GROWTH = 1000  # of a text by the normalizers of a file; those of published models: 40 at most


class _Normalizer(msgspec.Struct):
    """The keys of a tokenizer.json's normalizers that lengthen a text."""

    type: str
    normalizers: list["_Normalizer"] = []
    pattern: dict[Literal["String", "Regex"], str] = {}
    content: str = ""
    prepend: str = ""
    precompiled_charsmap: bytes | None = None


class _Model(msgspec.Struct):
    dropout: float | None = None


class _Json(msgspec.Struct):
    """The keys of a tokenizer.json that are checked; the library reads the others."""

    model: _Model
    normalizer: _Normalizer | None = None


class FileTokenizer(BaseTokenizer):
    """The tokenizer in a file: Hugging Face's tokenizer.json, or a SentencePiece .model.

    A tokenizer.json adds its own special tokens; after the pieces of a .model comes its end token, as with
    eos="sticky" in big_vision. A text that is cut keeps its special tokens.

    Args:
      path: the file; its name ends in .json or .model.
      cleaning: of the texts, a key of text_cleaning.CLEANINGS.
      pad_id: the id of the padding.

    Raises:
      TokenizerError: no such regular file, neither kind, one whose normalizers lengthen a text without bound, or the
        library for it is missing.
    """

    def __init__(self, path: epath.PathLike, cleaning: str = "lower", pad_id: int = 0):
        path = epath.Path(path)
        read = {".json": _tokenizer_json, ".model": _sentencepiece}.get(path.suffix)
        if read is None:
            raise TokenizerError(f"{path}: expected a tokenizer.json or a SentencePiece .model")
        try:
            content = regular_file.read(path, regular_file.MAX_JSON, "a tokenizer")
            found = read(path, content)
        except regular_file.FileError as error:
            raise TokenizerError(
                f"{error}; put the text tower's tokenizer there, or set model.text.tokenizer"
            ) from None
        self._path = path
        self._functions, self._ids, self.vocab_size = found, found.ids, found.vocab_size
        self.cleaning, self.pad_id = cleaning, pad_id

    def encode(self, texts: Sequence[str | bytes], context_length: int) -> Texts:
        """As `ClipTokenizer.encode`; a text of fewer than two tokens is padded to two.

        Raises:
          TokenizerError: not texts, or the file's own rules fail on them, or give ids or lengths that it cannot have.
        """
        cleaned = clean_all(texts, self.cleaning)
        rows = self._ids(cleaned, context_length + 1)
        too_long = [i for i, ids in enumerate(rows) if len(ids) > context_length]
        for i, ids in zip(too_long, self._ids([cleaned[i] for i in too_long], context_length)):
            rows[i] = ids
        longest = max(map(len, rows), default=0)
        if longest > context_length:
            raise TokenizerError(
                f"{self._path}: got {longest} tokens of a text that is cut to {context_length}; its special tokens"
                " do not fit, or repeat the text"
            )
        largest = max((i for row in rows for i in row), default=0)
        if largest >= self.vocab_size:
            raise TokenizerError(
                f"{self._path}: got the id {largest}, expected one below {self.vocab_size}, the number of its ids"
            )
        rows = [[*ids, *[self.pad_id] * (2 - len(ids))] for ids in rows]
        return Texts(
            ids=np.array([i for row in rows for i in row], np.int32),
            lengths=np.array([len(row) for row in rows], np.int32),
            too_long=np.isin(np.arange(len(rows)), too_long),
            text_ids=text_ids(cleaned),
        )

    @functools.cached_property
    def special_ids(self) -> tuple[int, ...]:
        """As of `BaseTokenizer`."""
        with _a_line(self._path, "fails on a text"):
            return self._functions.special_ids()

    def decode(self, ids: Sequence[int]) -> str:
        """As `BaseTokenizer.decode`, by the library of the file."""
        kept = self._text_ids_of(ids)
        with _a_line(self._path, "fails on ids"):
            return self._functions.decode(kept).strip()


class _FileFunctions(NamedTuple):
    """A tokenizer as its library has it."""

    ids: Callable[[list[str], int], list[list[int]]]  # texts, most tokens a text -> ids of each
    vocab_size: int  # the highest id + 1
    decode: Callable[[list[int]], str]
    special_ids: Callable[[], tuple[int, ...]]


def _tokenizer_json(path: epath.Path, content: bytes) -> _FileFunctions:
    if importlib.util.find_spec("tokenizers") is None:
        raise TokenizerError(f"{path}: needs `pip install tokenizers`")
    import tokenizers

    declared = regular_file.from_json(content, _Json, str(path), "a tokenizer.json")
    if declared.model.dropout:
        raise TokenizerError(
            f"{path}: model.dropout: got {declared.model.dropout:g}, expected none: a text has the same ids each time"
        )
    with _a_line(path, "not a tokenizer.json"):
        _check_growth(path, _growth(declared.normalizer))
        library = tokenizers.Tokenizer.from_str(content.decode())
        library.no_padding()
        # The ids of a file may have gaps, and those of its post-processor need not be in the vocabulary.
        known = [*library.get_vocab(with_added_tokens=True).values(), *library.encode("").ids]
        count = 1 + max(known, default=-1)

    def ids(texts: list[str], context_length: int) -> list[list[int]]:
        with _a_line(path, "fails on a text"):
            library.enable_truncation(context_length)
            return [encoding.ids for encoding in library.encode_batch(texts)]

    def special_ids() -> tuple[int, ...]:
        a_text, added = library.encode("a"), library.get_added_tokens_decoder()
        ids = {i for i, token in added.items() if token.special}
        ids |= {i for i, special in zip(a_text.ids, a_text.special_tokens_mask) if special}
        return tuple(sorted(ids))

    return _FileFunctions(ids, count, library.decode, special_ids)


def _growth(normalizer: _Normalizer | None) -> float:
    """How many times longer it makes a text, at most; infinite beyond what floats hold."""
    if normalizer is None:
        return 1.0
    part = normalizer
    # An expression may match nothing, between all characters.
    replaced = len(part.content) / (len(part.pattern.get("String", "")) or 1)
    replaced += part.pattern.get("String", "") == ""
    own = max(1.0, replaced) * (1 + len(part.prepend)) * _growth_of_map(part.precompiled_charsmap)
    return own * math.prod(map(_growth, part.normalizers))


def _growth_of_map(charsmap: bytes | None) -> int:
    """The longest text that SentencePiece's map puts in place of another: a trie of that many bytes, then the texts."""
    if not charsmap:
        return 1
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max(1, *(len(text) for text in texts.split(b"\0")))


def _check_growth(path: epath.Path, growth: float) -> None:
    if not growth <= MAX_GROWTH:
        raise TokenizerError(
            f"{path}: its normalizers make a text up to {growth:.3g} times longer, expected at most {MAX_GROWTH}"
        )


@contextlib.contextmanager
def _a_line(path: epath.Path, what: str) -> Iterator[None]:
    """Raises what the libraries raise, panics of Rust too, as a TokenizerError."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[-200:]
        raise TokenizerError(f"{path}: {what} ({reason})") from None


def _sentencepiece(path: epath.Path, content: bytes) -> _FileFunctions:
    if importlib.util.find_spec("sentencepiece") is None:
        raise TokenizerError(f"{path}: needs sentencepiece: pip install 'grain_jax[interop]'")
    import sentencepiece

    with _a_line(path, "not a SentencePiece model"):
        library = sentencepiece.SentencePieceProcessor(model_proto=content)
        normalizer = b"".join(_fields(content, 3))
        _check_growth(path, max(map(_growth_of_map, _fields(normalizer, 2)), default=1))
        end = library.eos_id()
    if end < 0:
        raise TokenizerError(f"{path}: the SentencePiece model has no end token")

    def ids(texts: list[str], context_length: int) -> list[list[int]]:
        with _a_line(path, "fails on a text"):
            return [[*pieces[: context_length - 1], end] for pieces in library.encode(texts)]

    def special_ids() -> tuple[int, ...]:
        kinds = library.is_control, library.is_unknown, library.is_unused
        every = range(library.vocab_size())
        return tuple(i for i in every if any(is_one(i) for is_one in kinds))

    return _FileFunctions(ids, library.vocab_size(), library.decode, special_ids)


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    """The values of a field of texts or messages in a protobuf message. Raises IndexError, ValueError."""

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    at = 0
    while at < len(message):
        tag = integer()
        if tag & 7 == 2:
            length = integer()
            if tag >> 3 == number:
                yield message[at : at + length]
        else:
            length = {0: 0, 1: 8, 5: 4}.get(tag & 7)
            if length is None:
                raise ValueError(f"got a field of type {tag & 7}")
            if tag & 7 == 0:
                integer()
        at += length
