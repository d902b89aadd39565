"""Tokenizers in files: Hugging Face's tokenizer.json and SentencePiece's .model."""

import importlib.util
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from grain_jax.input_pipeline.text_cleaning import (
    TokenizedTexts,
    TokenizerError,
    clean_all,
    text_ids,
)


class FileTokenizer:
    """The tokenizer in a file: Hugging Face's tokenizer.json, or a SentencePiece .model.

    A tokenizer.json adds its own special tokens; after the pieces of a .model comes its end token, as with
    eos="sticky" in big_vision. A text that is cut keeps its special tokens.

    Args:
      path: the file; its name ends in .json or .model.
      cleaning: of the texts, a key of text_cleaning.CLEANINGS.
      pad_id: the id of the padding.

    Raises:
      TokenizerError: no such file, neither kind, or the library for it is missing.
    """

    def __init__(self, path: epath.PathLike, cleaning: str = "lower", pad_id: int = 0):
        path = epath.Path(path)
        read = {".json": _tokenizer_json, ".model": _sentencepiece}.get(path.suffix)
        if read is None:
            raise TokenizerError(f"{path}: expected a tokenizer.json or a SentencePiece .model")
        if not path.is_file():
            raise TokenizerError(
                f"{path}: no such file; put the text tower's tokenizer there, or set model.text.tokenizer"
            )
        self._ids, self.vocab_size = read(path)
        self._cleaning, self._pad_id = cleaning, pad_id

    def encode(self, texts: Sequence[str | bytes], context_length: int) -> TokenizedTexts:
        """As `ClipTokenizer.encode`; a text of fewer than two tokens is padded to two."""
        cleaned = clean_all(texts, self._cleaning)
        rows = self._ids(cleaned, context_length + 1)
        too_long = [i for i, ids in enumerate(rows) if len(ids) > context_length]
        for i, ids in zip(too_long, self._ids([cleaned[i] for i in too_long], context_length)):
            rows[i] = ids
        rows = [[*ids, *[self._pad_id] * (2 - len(ids))] for ids in rows]
        return TokenizedTexts(
            ids=np.array([i for row in rows for i in row], np.int32),
            lengths=np.array([len(row) for row in rows], np.int32),
            too_long=np.isin(np.arange(len(rows)), too_long),
        )

    def __call__(self, texts: Sequence[str | bytes], context_length: int) -> np.ndarray:
        """Returns i32[N, context_length], padded with `pad_id`."""
        tokens = self.encode(texts, context_length)
        padded = np.full((len(tokens.lengths), context_length), self._pad_id, np.int32)
        padded[np.arange(context_length) < tokens.lengths[:, None]] = tokens.ids
        return padded

    def text_id(self, texts: Sequence[str | bytes]) -> np.ndarray:
        """Returns i32[N], equal where texts are equal after the cleaning. See `text_ids`."""
        return text_ids(clean_all(texts, self._cleaning))


# (texts, most tokens a text) -> the ids of each text; and the number of ids.
_FileFunctions = tuple[Callable[[list[str], int], list[list[int]]], int]


def _tokenizer_json(path: epath.Path) -> _FileFunctions:
    if importlib.util.find_spec("tokenizers") is None:
        raise TokenizerError(f"{path}: needs `pip install tokenizers`")
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_str(path.read_text())
    except Exception as error:  # the library raises plain Exceptions
        raise TokenizerError(f"{path}: not a tokenizer.json ({error})") from None
    library.no_padding()

    def ids(texts: list[str], context_length: int) -> list[list[int]]:
        library.enable_truncation(context_length)
        return [encoding.ids for encoding in library.encode_batch(texts)]

    return ids, library.get_vocab_size()


def _sentencepiece(path: epath.Path) -> _FileFunctions:
    if importlib.util.find_spec("sentencepiece") is None:
        raise TokenizerError(f"{path}: needs sentencepiece: pip install 'grain_jax[interop]'")
    import sentencepiece

    try:
        library = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise TokenizerError(f"{path}: not a SentencePiece model ({reason})") from None
    end = library.eos_id()
    if end < 0:
        raise TokenizerError(f"{path}: the SentencePiece model has no end token")

    def ids(texts: list[str], context_length: int) -> list[list[int]]:
        return [[*pieces[: context_length - 1], end] for pieces in library.encode(texts)]

    return ids, library.vocab_size()
