"""CLIP's byte pairs: text -> token ids. The ids equal the reference's on every text tried.

The reference's pattern splits a text into words. The package tokenizers merges the bytes of each word once;
after that the ids of the word come from a cache.
"""

import functools
import gzip
import itertools
from typing import TYPE_CHECKING

import regex
from etils import epath

if TYPE_CHECKING:
    import tokenizers

VOCAB_SIZE = 49408
START_OF_TEXT = 49406
END_OF_TEXT = 49407
PAD = 0  # also the id of "!": lengths, not ids, tell padding from text
_VOCABULARY = epath.Path(__file__).with_name("clip_vocabulary.txt.gz")

_END_OF_WORD = "</w>"
SPECIAL = {"<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_OR_SPECIAL = regex.compile("|".join([*map(regex.escape, SPECIAL), WORD]), flags=regex.IGNORECASE)
_CACHED_WORDS = 1 << 17


def token_ids(texts: list[str], most: int) -> list[list[int]]:
    """The ids of each cleaned text: start token, tokens, end token; at most `most`, which is 2 or more."""
    rows = []
    for text in texts:
        ids = map(_ids_of_word, _WORD_OR_SPECIAL.findall(text))
        rows.append([START_OF_TEXT, *itertools.chain.from_iterable(ids)][: most - 1])
        rows[-1].append(END_OF_TEXT)
    return rows


@functools.lru_cache(_CACHED_WORDS)
def _ids_of_word(word: str) -> list[int]:
    return [SPECIAL[word]] if word in SPECIAL else _library().encode(word).ids


def tokens_and_merges() -> tuple[list[str], list[tuple[str, str]]]:
    """(the tokens in the order of their ids, the merges); a token that ends a word ends in "</w>"."""
    # clip_vocabulary.LICENSE.txt names the source. The first tokens stand for the 256 bytes, as in GPT-2.
    _, *lines = gzip.decompress(_VOCABULARY.read_bytes()).decode("utf-8").splitlines()
    merges = [(left, right) for left, right in map(str.split, lines)]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]
    merged = ("".join(pair) for pair in merges)
    return [*characters, *(c + _END_OF_WORD for c in characters), *merged, *SPECIAL], merges


def byte_pairs() -> "tokenizers.Tokenizer":
    """CLIP's words and merges for the package tokenizers; it neither cleans texts nor adds ids."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    tokens, merges = tokens_and_merges()
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


_library = functools.cache(byte_pairs)
