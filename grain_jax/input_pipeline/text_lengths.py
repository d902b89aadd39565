"""Lengths of the texts of a data set, in tokens, of a sample of its images: `text.pack_rows` is derived from them.

`grain-jax build` writes them beside the records (`FILE`; data/SCHEMA.md). Reading it needs neither TensorFlow nor JAX.
"""

import hashlib
import heapq
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath

from grain_jax.config import Dataset
from grain_jax.core import regular_file

FILE = "text_lengths.json"
IMAGES = 4096  # in a sample, at most
LONGEST = 1024  # tokens; a longer text counts as this long
_CHUNK = 2048  # texts per call of the tokenizer


Value = TypeVar("Value")


class TextLengths(NamedTuple):
    """Numbers of tokens of the texts of N images, start and end included, before any cut.

    Attributes:
      name: of the data set, for messages.
      tokenizer: `model.text.tokenizer`.
      records: images of the set; N or more.
      captions: int32 [N, C], the web captions of an image, 0 behind them.
      synthetic: int32 [N], the synthetic caption; 0 where there is none.
      descriptions: int32 [N, M], those of its regions, the highest score first, 0 behind them.
      negatives: int32 [N, M, K], those of each description, 0 behind them; None: no region has any.
    """

    name: str
    tokenizer: str
    records: int
    captions: np.ndarray
    synthetic: np.ndarray
    descriptions: np.ndarray
    negatives: np.ndarray | None = None


def of_texts(
    images: Sequence[tuple],
    text_tokenizer: Any,
    *,
    name: str,
    tokenizer: str,
    records: int,
) -> TextLengths:
    """The lengths of the texts of a data set.

    Args:
      images: (web captions, synthetic caption or "", descriptions in the order of scores) of each and, where the set
        has negatives, a list of those of each description.
      text_tokenizer: makes the tokens.
      name: of the data set.
      tokenizer: `model.text.tokenizer`.
      records: images of the set.
    """
    rows = _measured(images, text_tokenizer)
    return _table(rows, name=name, tokenizer=tokenizer, records=records)


def _measured(images: Sequence[tuple], text_tokenizer: Any) -> list[list]:
    """Numbers of tokens in place of the texts, which stand in lists in lists; 0 for ""."""

    def each(part: Any) -> Any:
        is_text = isinstance(part, str | bytes)
        return lengths.setdefault(part, 0) if is_text else list(map(each, part))

    lengths: dict[str | bytes, int] = {}
    each(images)  # notes the texts
    flat = [text for text in lengths if text]
    for first in range(0, len(flat), _CHUNK):
        part = flat[first : first + _CHUNK]
        lengths |= zip(part, text_tokenizer.encode(part, LONGEST).lengths.tolist(), strict=True)
    return each(images)


def _table(rows: Sequence[Sequence], **about: Any) -> TextLengths:
    captions, synthetic, descriptions, *negatives = zip(*rows, strict=True)
    if negatives:
        most = max((len(of) for of_image in negatives[0] for of in of_image), default=0)
        shape = len(rows), max(map(len, descriptions)), most
        about["negatives"] = np.zeros(shape, np.int32)
        for i, of_image in enumerate(negatives[0]):
            for j, of_region in enumerate(of_image):
                about["negatives"][i, j, : len(of_region)] = of_region
    return TextLengths(
        captions=_padded(captions),
        synthetic=np.array(synthetic, np.int32),
        descriptions=_padded(descriptions),
        **about,
    )


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    out = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def best_first(values: Sequence[Value], scores: Sequence[float]) -> list[Value]:
    """A value of each region, the highest score first; among equals the first comes first."""
    return [values[int(i)] for i in np.argsort(-np.asarray(scores), kind="stable")]


class Sample:
    """Chooses the images of a sample while a set is written: those whose ids have the lowest hashes.

    So the sample does not depend on the order or the number of the workers.

    Args:
      negatives: whether the lengths of the negatives are kept, too.
    """

    def __init__(self, negatives: bool = False):
        self.records = 0
        self._negatives = negatives
        # (minus the hash, id, texts): the highest hash comes first.
        self._heap: list[tuple[int, str, tuple]] = []

    def watch(self, examples: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Yields the examples (of `data.example.encode`) and keeps the texts of the sample."""
        for item in examples:
            self.records += 1
            key = -int.from_bytes(hashlib.sha256(item["id"].encode()).digest()[:8], "big")
            if len(self._heap) < IMAGES or key > self._heap[0][0]:
                regions = best_first(item["regions"], [r["score"] for r in item["regions"]])
                of = [region["description"] for region in regions]
                texts = (item["captions"], item["synthetic_caption"], of)
                if self._negatives:
                    texts += ([region["negatives"] for region in regions],)
                heapq.heappush(self._heap, (key, item["id"], texts))
                if len(self._heap) > IMAGES:
                    heapq.heappop(self._heap)
            yield item

    def encode(self, text_tokenizer: Any) -> bytes:
        """The content of `FILE`, in CLIP's tokens: `images` has [web captions, synthetic caption, descriptions] of each.

        Where the set has negatives, a list of those of each description comes last.
        """
        chosen = [texts for _, _, texts in sorted(self._heap, reverse=True)]
        images = [
            [[n for n in web if n], synthetic, *of_regions]
            for web, synthetic, *of_regions in _measured(chosen, text_tokenizer)
        ]
        content = {"tokenizer": "clip", "records": self.records, "images": images}
        return (json.dumps(content, separators=(",", ":")) + "\n").encode()


def newest_version(source: Dataset) -> epath.Path | None:
    """The folder of the newest version of the set, or None where there is none."""
    folder = epath.Path(source.data_dir) / source.name
    if not source.name or not folder.is_dir():
        return None
    versions = [
        (tuple(map(int, path.name.split("."))), path)
        for path in folder.iterdir()
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").exists()
    ]
    return max(versions)[1] if versions else None


def read(source: Dataset, tokenizer: str) -> TextLengths | None:
    """The lengths in the file beside the records of the set; None: no file, or one of another tokenizer or split."""
    folder = newest_version(source)
    if folder is None or source.split != "train" or not (folder / FILE).exists():
        return None
    try:
        found = regular_file.read_json(folder / FILE, dict[str, Any], "lengths of texts", 4 << 30)
        if found["tokenizer"] != tokenizer:
            return None
        return _table(
            found["images"],
            name=repr(source.name),
            tokenizer=tokenizer,
            records=int(found["records"]),
        )
    except (ValueError, LookupError, TypeError, OverflowError):  # damaged: the records are read
        return None
