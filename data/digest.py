"""A digest of the records of a split, for `digest.json` beside them, which training reads.

A record counts by what it holds. The order of the records is TFDS's, a function of their ids and of the shards'
lengths, so it needs no place here.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class Digest:
    """A sum of SHA-256 modulo 2**256, one for each example; their order does not matter."""

    def __init__(self):
        self._sum = 0

    def counting(self, examples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Passes the examples on (`data.example.encode`, with an id) and adds each to the sum."""
        for example in examples:
            self._sum += int.from_bytes(_of_example(example), "big")
            yield example

    def hex(self) -> str:
        """64 hexadecimal digits."""
        return f"{self._sum % 2**256:064x}"


def _of_example(example: Mapping[str, Any]) -> bytes:
    regions: Sequence[Mapping[str, Any]] = example["regions"]
    texts = [example["id"], example["synthetic_caption"], *example["captions"]]
    texts += [region["description"] for region in regions]
    numbers = [[*region["bbox"], region["score"]] for region in regions]
    parts = [example["image"], *(text.encode() for text in texts)]
    parts.append(np.asarray(numbers, "<f4").tobytes())
    negatives = [region.get("negatives", ()) for region in regions]
    if any(negatives):  # a dataset without this feature has the same digest as one with empty lists
        for of_region in negatives:
            parts.append(len(of_region).to_bytes(8, "big"))
            parts += [text.encode() for text in of_region]
    digest = hashlib.sha256()
    for part in parts:  # with lengths, so that no byte can move to the next part
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
