"""The tokenizers of text towers: CLIP's, or the one in the file that `model.text.tokenizer` names."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath, epy

from grain_jax import config as config_lib
from grain_jax.core import atomic, regular_file
from grain_jax.input_pipeline import clip_tokenizer
from grain_jax.input_pipeline.text_cleaning import TokenizerError, clean_all, text_ids
from grain_jax.input_pipeline.text_cleaning import clean as clean

with epy.lazy_imports():
    import msgspec
    import sentencepiece
    import tokenizers

# Cleaned texts, the most tokens per text -> the ids of each, special tokens included.
TokenIds = Callable[[list[str], int], list[list[int]]]


class TokenizedTexts(NamedTuple):
    """N texts as tokens, without padding."""

    ids: np.ndarray  # int32 [sum(lengths)], text after text
    lengths: np.ndarray  # int32 [N], each 1 or more
    too_long: np.ndarray  # bool [N], the texts that were cut
    text_ids: np.ndarray  # int32 [N], equal where the cleaned texts are equal


class Tokenizer:
    """Cleans texts and turns them into token ids.

    Args:
      token_ids: the function that does it.
      vocab_size: the highest id + 1.
      cleaning: of the texts, a key of text_cleaning.CLEANINGS.
      pad_id: the id of the padding.
      name: of the tokenizer, for errors.
    """

    def __init__(self, token_ids: TokenIds, vocab_size: int, cleaning: str, pad_id: int, name: str):
        self._token_ids, self._name = token_ids, name
        self.vocab_size, self.cleaning, self.pad_id = vocab_size, cleaning, pad_id

    def encode(self, texts: Sequence[str | bytes], context_length: int) -> TokenizedTexts:
        """The tokens of N strings (or UTF-8 bytes), cleaned here.

        A text of more than `context_length` tokens is cut and keeps its special tokens; one without tokens
        gets one of padding.

        Raises:
          TokenizerError: not texts, or they cannot be tokenised.
        """
        cleaned = clean_all(texts, self.cleaning)
        # One token more, so that a text that just fits differs from one that does not.
        rows = self._token_ids(cleaned, context_length + 1)
        too_long = np.array([len(row) > context_length for row in rows], bool)
        cut = np.flatnonzero(too_long).tolist()
        for i, row in zip(cut, self._token_ids([cleaned[i] for i in cut], context_length)):
            rows[i] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        for i in np.flatnonzero(lengths == 0).tolist():
            rows[i] = [self.pad_id]
        ids = np.array([i for row in rows for i in row], np.int64)
        longest, largest = lengths.max(initial=0), ids.max(initial=0)
        if longest > context_length or largest >= self.vocab_size:
            raise TokenizerError(
                f"{self._name}: got a text of {longest} tokens with ids up to {largest}, expected at most"
                f" {context_length} tokens and ids below {self.vocab_size}; its special tokens do not fit"
            )
        return TokenizedTexts(ids.astype(np.int32), lengths.clip(min=1), too_long, text_ids(cleaned))

    def __call__(self, texts: Sequence[str | bytes], context_length: int = 77) -> np.ndarray:
        """Returns i32[N, context_length], padded with `pad_id`. As `encode`; 2-D even for one text."""
        tokens = self.encode(texts, context_length)
        padded = np.full((len(tokens.lengths), context_length), self.pad_id, np.int32)
        padded[np.arange(context_length) < tokens.lengths[:, None]] = tokens.ids
        return padded


class ClipTokenizer(Tokenizer):
    """CLIP's tokenizer, 49,408 ids."""

    def __init__(self):
        size, pad = clip_tokenizer.VOCAB_SIZE, clip_tokenizer.PAD
        super().__init__(clip_tokenizer.token_ids, size, "lower", pad, "clip")


class FileTokenizer(Tokenizer):
    """The tokenizer in a file: Hugging Face's tokenizer.json, or a SentencePiece .model.

    A tokenizer.json adds its own special tokens. After the pieces of a .model comes its end token, as with
    eos="sticky" in big_vision.

    Args:
      path: the file; its name ends in .json or .model.
      cleaning: of the texts, a key of text_cleaning.CLEANINGS.
      pad_id: the id of the padding.

    Raises:
      regular_file.FileError: no such regular file.
      TokenizerError: neither kind, or the library for it is missing.
    """

    def __init__(self, path: epath.PathLike, cleaning: str = "lower", pad_id: int = 0):
        path = epath.Path(path)
        read = {".json": _tokenizer_json, ".model": _sentencepiece}.get(path.suffix)
        if read is None:
            raise TokenizerError(f"{path}: expected a tokenizer.json or a SentencePiece .model")
        super().__init__(*read(path, content_of(path)), cleaning, pad_id, str(path))


@contextlib.contextmanager
def _one_line(path: epath.Path, fault: str) -> Iterator[None]:
    """Raises what the libraries raise, panics of Rust too, as a TokenizerError."""
    try:
        yield
    except TokenizerError:
        raise
    except ImportError as error:
        raise TokenizerError(f"{path}: needs {error.name}: pip install 'grain_jax[interop]'") from None
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[-200:]
        raise TokenizerError(f"{path}: {fault} ({reason})") from None


def _tokenizer_json(path: epath.Path, content: bytes) -> tuple[TokenIds, int]:
    with _one_line(path, "not a tokenizer.json"):
        library = tokenizers.Tokenizer.from_str(content.decode())
        dropout = msgspec.json.decode(content)["model"].get("dropout")
        # The ids of a file may have gaps, and its post-processor may add ids that the vocabulary lacks.
        known = [*library.get_vocab(with_added_tokens=True).values(), *library.encode("").ids]
        library.no_padding()
    if dropout:
        raise TokenizerError(
            f"{path}: model.dropout: got {dropout}, expected none: a text has the same ids each time"
        )

    def token_ids(texts: list[str], most: int) -> list[list[int]]:
        with _one_line(path, "fails on a text"):
            library.enable_truncation(most)
            return [encoding.ids for encoding in library.encode_batch(texts)]

    return token_ids, 1 + max(known, default=-1)


def _sentencepiece(path: epath.Path, content: bytes) -> tuple[TokenIds, int]:
    with _one_line(path, "not a SentencePiece model"):
        library = sentencepiece.SentencePieceProcessor(model_proto=content)
        end = library.eos_id()
    if end < 0:
        raise TokenizerError(f"{path}: the SentencePiece model has no end token")

    def token_ids(texts: list[str], most: int) -> list[list[int]]:
        with _one_line(path, "fails on a text"):
            return [[*pieces[: most - 1], end] for pieces in library.encode(texts)]

    return token_ids, library.vocab_size()


def of_tower(tower: config_lib.TextTower, folder: epath.PathLike | None = None) -> Tokenizer:
    """The tokenizer of a text tower, as `model.text.tokenizer` names it.

    Args:
      tower: `model.text`.
      folder: of the model (`file_of`).

    Raises:
      UserError: it cannot be read, or has an id beyond the tower's embeddings.
    """
    if tower.tokenizer == "clip":
        tokenizer = ClipTokenizer()
        if tower.pad_id != tokenizer.pad_id:
            raise TokenizerError(
                f"model.text.pad_id: got {tower.pad_id}, expected {tokenizer.pad_id}, CLIP's tokenizer's"
            )
    else:
        path = file_of(tower, folder)
        tokenizer = FileTokenizer(path, tower.cleaning, tower.pad_id)
    if tokenizer.vocab_size > tower.vocab_size:
        raise TokenizerError(
            f"model.text.tokenizer: {tower.tokenizer} has ids up to {tokenizer.vocab_size - 1}, but"
            f" model.text.vocab_size is {tower.vocab_size}; name the tokenizer that the tower was trained on"
        )
    return tokenizer


def content_of(path: epath.PathLike) -> bytes:
    """The bytes of a tokenizer's file. Raises regular_file.FileError."""
    expected = "the file that model.text.tokenizer names"
    return regular_file.read(path, regular_file.MAX_JSON, expected)


def file_of(tower: config_lib.TextTower, folder: epath.PathLike | None = None) -> epath.Path:
    """The file that `model.text.tokenizer` names, whether it exists or not.

    Args:
      tower: a text tower whose tokenizer is a file.
      folder: of the model. A relative path is looked for there first, then, for a checkpoint, as the copy
        that the trainer keeps in the workdir.
    """
    there = (path for path in _copies(tower, folder) if path.exists())
    return next(there, epath.Path(tower.tokenizer))


def own_file(tower: config_lib.TextTower, folder: epath.PathLike | None) -> epath.Path | None:
    """The file that `model.text.tokenizer` names if it lies in the model's folder or workdir; else None.

    For commands that copy it: the config may be a stranger's, and name a file or an object store of the
    reader's. Nothing asks for a file elsewhere.
    """
    if folder is None:
        return None
    paths = (*_copies(tower, folder), epath.Path(tower.tokenizer))
    return next((p for p in paths if _is_inside(p, folder) and regular_file.is_one(p)), None)


def _copies(tower: config_lib.TextTower, folder: epath.PathLike | None) -> Iterator[epath.Path]:
    """Where the file lies if it came with the model."""
    if folder is None:
        return
    path, folder = epath.Path(tower.tokenizer), epath.Path(folder)
    if not path.is_absolute():
        yield folder / path
    if folder.parent.name == "checkpoints":
        yield folder.parent.parent / path.name


def _is_inside(path: epath.Path, folder: epath.PathLike) -> bool:
    """Whether `path`, with links followed, is below the folder of the model, or its workdir."""
    folder = epath.Path(folder)
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    if regular_file.is_remote(path) or regular_file.is_remote(folder):  # stores have no links
        return path.is_relative_to(folder) and ".." not in path.parts
    roots = [folder]
    repository = folder.parent.parent
    if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
        roots.append(repository / "blobs")  # what huggingface_hub's folders link to
    # etils' own resolve() follows no links.
    real = epath.Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(root)) for root in roots)


def keep_copy(tower: config_lib.TextTower, workdir: epath.Path) -> None:
    """Copies the file of the tokenizer into the workdir, so that its checkpoints need no file outside.

    Raises:
      regular_file.FileError: there is something else than a file.
    """
    if tower.tokenizer == "clip" or not (path := file_of(tower)).exists():
        return
    copy, content = workdir / path.name, content_of(path)
    if not (copy.exists() and content_of(copy) == content):
        atomic.write_bytes(copy, content)
