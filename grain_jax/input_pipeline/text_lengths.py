"""How long the texts of a record set are, in tokens: a sample of its images, from which rows are derived.

`data.build` writes it beside the records (`FILE`; data/SCHEMA.md). Reading it needs neither TensorFlow nor JAX.
"""

import hashlib
import heapq
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax.config import Dataset

FILE = "text_lengths.json"
IMAGES = 4096  # in a sample, at most
LONGEST = 1024  # tokens; a longer text counts as one of so many
_CHUNK = 2048  # texts that are tokenised at once


class TextLengths(NamedTuple):
    """The tokens of the texts of N images, with start and end, before any cut.

    Attributes:
      name: words for what the images are of, such as the set's name.
      tokenizer: `model.text.tokenizer`.
      records: images of the set; N or more.
      captions: int32 [N, C], the web captions of an image, 0 behind them.
      synthetic: int32 [N], the synthetic caption; 0 where there is none.
      descriptions: int32 [N, M], those of its regions, the highest score first, 0 behind them.
    """

    name: str
    tokenizer: str
    records: int
    captions: np.ndarray
    synthetic: np.ndarray
    descriptions: np.ndarray


def of_texts(
    images: Sequence[tuple[Sequence[str], str, Sequence[str]]],
    text_tokenizer: Any,
    *,
    name: str,
    tokenizer: str,
    records: int,
) -> TextLengths:
    """The lengths of (web captions, synthetic caption or "", descriptions in the order of scores) of each image."""
    flat = [text for web, synthetic, of in images for text in (*web, synthetic, *of)]
    lengths: list[int] = []
    for first in range(0, len(flat), _CHUNK):
        part = flat[first : first + _CHUNK]
        tokens = text_tokenizer.encode(part, LONGEST).lengths
        lengths += np.where([bool(text) for text in part], tokens, 0).tolist()
    left = iter(lengths)
    rows = [
        ([next(left) for _ in web], next(left), [next(left) for _ in of]) for web, _, of in images
    ]
    return _table(rows, name=name, tokenizer=tokenizer, records=records)


def _table(rows: Sequence[tuple], **about: Any) -> TextLengths:
    captions, synthetic, descriptions = zip(*rows)
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


def best_first(descriptions: Sequence[str], scores: Sequence[float]) -> list[str]:
    """The descriptions by falling score; of equal ones the first comes first."""
    return [descriptions[i] for i in np.argsort(-np.asarray(scores), kind="stable")]


class Sample:
    """Chooses the images of a sample while a set is written: those whose ids have the lowest hashes.

    So the sample depends neither on the order nor on the number of the workers.
    """

    def __init__(self):
        self.records = 0
        self._heap: list[
            tuple[int, str, tuple]
        ] = []  # the highest hash first, as a negative number

    def watch(self, examples: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Passes the examples on, as `data.example.encode` gives them, with their ids."""
        for item in examples:
            self.records += 1
            key = -int.from_bytes(hashlib.sha256(item["id"].encode()).digest()[:8], "big")
            if len(self._heap) < IMAGES or key > self._heap[0][0]:
                regions = item["regions"]
                of = best_first([r["description"] for r in regions], [r["score"] for r in regions])
                texts = (item["captions"], item["synthetic_caption"], of)
                push = heapq.heappush if len(self._heap) < IMAGES else heapq.heapreplace
                push(self._heap, (key, item["id"], texts))
            yield item

    def encode(self, name: str, text_tokenizer: Any) -> bytes:
        """The content of `FILE`, in CLIP's tokens."""
        chosen = [texts for _, _, texts in sorted(self._heap, reverse=True)]
        found = of_texts(chosen, text_tokenizer, name=name, tokenizer="clip", records=self.records)
        return to_json(found).encode()


def to_json(lengths: TextLengths) -> str:
    """As `FILE` has it: `images` has [web captions, synthetic caption, descriptions] of each image."""
    images = [
        [web[web > 0].tolist(), int(synthetic), of[of > 0].tolist()]
        for web, synthetic, of in zip(lengths.captions, lengths.synthetic, lengths.descriptions)
    ]
    about = {"tokenizer": lengths.tokenizer, "records": lengths.records}
    return json.dumps(about | {"images": images}, separators=(",", ":")) + "\n"


def newest_version(source: Dataset) -> epath.Path | None:
    """The folder of the newest version of that set, or None where there is none."""
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
    """What stands beside the records of that set; None: nothing, or of another tokenizer or split."""
    folder = newest_version(source)
    if folder is None or source.split != "train" or not (folder / FILE).exists():
        return None
    try:
        found = json.loads((folder / FILE).read_text())
        if found["tokenizer"] != tokenizer:
            return None
        return _table(
            found["images"],
            name=repr(source.name),
            tokenizer=tokenizer,
            records=int(found["records"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError):  # the records themselves tell as much
        return None
