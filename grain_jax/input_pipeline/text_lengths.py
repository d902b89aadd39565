"""Numbers of tokens of a sample of a dataset's texts: `text.pack_rows` is derived from them.

`grain-jax build` writes them beside the records (`FILE`; data/SCHEMA.md). Reading it needs neither TensorFlow nor JAX.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from etils import epath

from grain_jax.config import Dataset
from grain_jax.core import errors, nearest, regular_file

FILE = "text_lengths.json"
VERSION = "1.0.0"  # of the record format, and the folder that TFDS looks for
IMAGES = 4096  # in a sample, at most
LONGEST = 1024  # tokens; a longer text counts as this long


class ImageTexts(NamedTuple):
    """The texts of an image, or the number of tokens of each."""

    captions: Sequence[Any]  # from the web
    synthetic_caption: Any  # "" or 0: none
    descriptions: Sequence[Any]  # of its regions, the highest score first
    negatives: Sequence[Sequence[Any]] = ()  # of each description; (): none


class TextLengths(NamedTuple):
    """Numbers of tokens of the texts of N images, start and end included, before any cut; 0 for no text.

    Attributes:
      name: of the dataset, for messages.
      records: images of the set; N or more.
      captions: int32 [N, C], the web captions.
      synthetic: int32 [N], the synthetic caption.
      descriptions: int32 [N, M], of the regions, the highest score first.
      negatives: int32 [N, M, K], hard negatives of each description.
    """

    name: str
    records: int
    captions: np.ndarray
    synthetic: np.ndarray
    descriptions: np.ndarray
    negatives: np.ndarray


class _LengthsFile(msgspec.Struct):
    """The content of FILE."""

    tokenizer: str
    records: int
    images: list[ImageTexts]


def of_texts(images: Sequence[ImageTexts], text_tokenizer: Any, *, name: str, records: int) -> TextLengths:
    """The lengths of the texts of a dataset.

    Args:
      images: a sample.
      text_tokenizer: makes the tokens.
      name: of the dataset.
      records: images of the set.
    """
    return _table(_count(images, text_tokenizer), name, records)


def _count(images: Sequence[ImageTexts], text_tokenizer: Any) -> list[ImageTexts]:
    """Numbers of tokens in place of the texts; 0 for ""."""

    def each(part: Any) -> Any:
        is_text = isinstance(part, str | bytes)
        return lengths.setdefault(part, 0) if is_text else list(map(each, part))

    lengths: dict[str | bytes, int] = {}
    each(images)  # notes the texts
    flat = [text for text in lengths if text]
    lengths |= zip(flat, text_tokenizer.encode(flat, LONGEST).lengths.tolist(), strict=True)
    return [ImageTexts(*each(image)) for image in images]


def _table(images: Sequence[ImageTexts], name: str, records: int) -> TextLengths:
    captions, synthetic, descriptions, negatives = zip(*images, strict=True)
    captions, descriptions = _padded(captions), _padded(descriptions)
    most = max((len(texts) for regions in negatives for texts in regions), default=0)
    of_negatives = np.zeros((*descriptions.shape, most), np.int32)
    for i, regions in enumerate(negatives):
        for j, texts in enumerate(regions):
            of_negatives[i, j, : len(texts)] = texts
    synthetic = np.array(synthetic, np.int32)
    return TextLengths(name, records, captions, synthetic, descriptions, of_negatives)


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    out = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for padded, row in zip(out, rows, strict=True):
        padded[: len(row)] = row
    return out


class TextSample:
    """Chooses the images of a sample while a set is written: those whose ids have the lowest hashes.

    So the sample does not depend on the order or the number of the workers.
    """

    def __init__(self):
        self.records = 0
        # (minus the hash, id, texts): the highest hash comes first.
        self._heap: list[tuple[int, str, ImageTexts]] = []

    def watch(self, examples: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Yields the examples (of `data.example.encode`) and keeps the texts of the sample."""
        for item in examples:
            self.records += 1
            key = -int.from_bytes(hashlib.sha256(item["id"].encode()).digest()[:8], "big")
            if len(self._heap) < IMAGES or key > self._heap[0][0]:
                regions = sorted(item["regions"], key=lambda region: -region["score"])
                texts = ImageTexts(
                    [text for text in item["captions"] if text],
                    item["synthetic_caption"],
                    [region["description"] for region in regions],
                    [region.get("negatives", ()) for region in regions],
                )
                put = heapq.heappush if len(self._heap) < IMAGES else heapq.heappushpop
                put(self._heap, (key, item["id"], texts))
            yield item

    def encode(self, text_tokenizer: Any) -> bytes:
        """The content of `FILE`, in CLIP's tokens."""
        texts = [texts for _, _, texts in sorted(self._heap, reverse=True)]
        content = _LengthsFile("clip", self.records, _count(texts, text_tokenizer))
        return msgspec.json.encode(content) + b"\n"


def folder_of(source: Dataset) -> epath.Path | None:
    """The folder of the records of a set, or None if there is no complete one."""
    folder = epath.Path(source.data_dir) / source.name / VERSION
    return folder if source.name and (folder / "dataset_info.json").exists() else None


def existing_folder_of(source: Dataset) -> epath.Path:
    """The folder of the records of a set. Raises MissingData: a name is not set, or no complete set is there."""
    if missing := [key for key in ("data_dir", "name") if not getattr(source, key)]:
        expected = "what grain-jax build --output DATA_DIR --name NAME was given"
        flag = f"--config.input.{missing[0]}=..."
        raise errors.MissingData(f"input.{missing[0]}: got '', expected {expected}: {flag}")
    if folder := folder_of(source):
        return folder
    root = epath.Path(source.data_dir)
    sets = sorted(x.parent.parent.name for x in root.glob(f"*/{VERSION}/dataset_info.json"))
    near = f"; {nearest.did_you_mean(source.name, sets)}" if sets else ""
    raise errors.MissingData(
        f"no record set {source.name!r} in {source.data_dir!r}{near} (looked for {root / source.name}/{VERSION}; make it"
        f" with: grain-jax build --annotations A.jsonl --images DIR --output {root} --name {source.name})"
    )


def read(source: Dataset, tokenizer: str | None = None) -> TextLengths | None:
    """The lengths in the file beside the records of the set; None: no file, or one of another tokenizer or split.

    With `tokenizer` None any will do. Raises regular_file.FileError: the file is damaged.
    """
    folder = folder_of(source)
    if folder is None or source.split != "train" or not (folder / FILE).exists():
        return None
    content = regular_file.read_json(folder / FILE, _LengthsFile, "lengths of texts", 4 << 30)
    if tokenizer not in (None, content.tokenizer):
        return None
    return _table(content.images, repr(source.name), content.records)
