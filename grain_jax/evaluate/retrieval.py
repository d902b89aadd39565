"""Retrieval between images and captions, in both directions: R@1, R@5, R@10 (Flickr30k, MS-COCO, or any A.jsonl).

Every caption of an image is a query. The candidate texts are the distinct captions; if several images have the same
caption, each of them is a right answer to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epy

from grain_jax.config.evals import STANDALONE, Context, TableRow
from grain_jax.evaluate.evaluators import AnnotatedImages

with epy.lazy_imports():
    import numpy as np

    from grain_jax.core import annotations as annotations_lib
    from grain_jax.evaluate import encode, rates
    from grain_jax.inference import scores
    from grain_jax.input_pipeline import tokenizer

KS = (1, 5, 10)
_ROWS_AT_ONCE = 1024  # queries; bounds the memory of the similarities


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(AnnotatedImages):
    """R@1, R@5, R@10 between images and captions, both ways."""

    left_out = "without_caption"
    kind: str = "retrieval"

    @classmethod
    def rows(cls, numbers: Mapping[str, float]) -> Sequence[TableRow]:
        return [
            TableRow(f"{way}/r{k}", f"{label} R@{k}", f"{way}/chance_r{k}", unit, unit)
            for way, label, unit in (
                ("image_to_text", "image to text", "pictures"),
                ("text_to_image", "text to image", "captions"),
            )
            for k in KS
        ]

    def usable(self, record: annotations_lib.Annotation) -> Any:
        return record.captions or record.synthetic_caption

    @property
    def none_usable(self) -> str:
        return "no line has a caption; expected captions to retrieve"

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Ranks all distinct captions for each image, and all images for each caption.

        An image without a web caption has its synthetic one instead, and one without either is left out; both are
        counted. Two captions are equal where they are equal after the tokenizer's cleaning and lower-casing.

        Returns: counts; `image_to_text` and `text_to_image`, each with `r1`, `r5`, `r10` (a right answer among
          the first k; 95% intervals `_low`, `_high`) and `chance_r1`... (of a random order). Ties count as if
          broken at random.
        """
        kept, seen, counts = self.gather(predictor, context, regions=False)
        image_embed = scores.unit(seen.image_embed)  # [N, D]
        owner, text_of, texts = _pairs(kept)
        text_embed = scores.unit(encode.encode_distinct(predictor, texts))  # [M, D]

        right = np.zeros((len(kept), len(texts)), bool)
        right[owner, text_of] = True
        return {
            **counts,
            "captions": len(owner),
            "distinct_captions": len(texts),
            "synthetic_captions": sum(not r.captions for r in kept),
            "image_to_text": _recalls(image_embed, text_embed, right),
            "text_to_image": _recalls(text_embed, image_embed, right.T, rows=text_of),
        }


def _pairs(
    records: Sequence[annotations_lib.Annotation],
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """For each caption the positions of its image and of its text, both int; and the distinct texts."""
    place: dict[str, int] = {}
    owner, text_of, texts = [], [], []
    for i, record in enumerate(records):
        for caption in record.captions or (record.synthetic_caption,):
            key = tokenizer.clean(caption).lower()
            if key not in place:
                place[key] = len(texts)
                texts.append(caption)
            owner.append(i)
            text_of.append(place[key])
    return np.array(owner), np.array(text_of), texts


def _recalls(
    queries: np.ndarray,
    candidates: np.ndarray,
    right: np.ndarray,
    rows: np.ndarray | None = None,
) -> dict[str, float]:
    """R@k of ranking `candidates` [C, D] for `queries` [N, D].

    Args:
      queries, candidates: of unit length.
      right: bool [N, C].
      rows: int, positions of the queries to average over, with repetitions; None: each query once.
    """
    parts: dict[int, list[np.ndarray]] = {k: [] for k in KS}
    for first in range(0, len(queries), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        similarity = queries[part] @ candidates.T
        for k in KS:
            parts[k].append(rates.topk_hits(similarity, right[part], k))
    out = {}
    for k in KS:
        hits = np.concatenate(parts[k])
        chance = rates.chance_of_topk(right, k)
        if rows is not None:
            hits, chance = hits[rows], chance[rows]
        out |= {**rates.rate(f"r{k}", hits), f"chance_r{k}": float(chance.mean())}
    return out
