"""Retrieval between images and captions, both ways: R@1, R@5, R@10 (docs/evaluate.md)."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from grain_jax.evaluate.evaluators import AnnotatedImages

with epy.lazy_imports():
    import numpy as np

    from grain_jax.core import annotations as annotations_lib
    from grain_jax.evaluate import encode, rates
    from grain_jax.inference import prompts, scores

KS = (1, 5, 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(AnnotatedImages):
    """R@1, R@5, R@10 between images and captions, both ways."""

    left_out = "without_caption"
    none_usable = "no line has a caption; expected captions to retrieve"
    kind: str = "retrieval"

    def usable(self, record: annotations_lib.Annotation) -> Any:
        return record.captions or record.synthetic_caption

    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Ranks all distinct captions for each image, and all images for each caption.

        An image without a web caption has its synthetic one.

        Returns: counts; `image_to_text` and `text_to_image`, each with `r1`, `r5`, `r10` (a right answer
          among the first k) and `chance_r1`... (of a random order).
        """
        records, seen, counts = self.gather(predictor, regions=False)
        image_embed = scores.unit(seen.image_embed)  # [N, D]
        captions = [record.captions or (record.synthetic_caption,) for record in records]
        owner = np.repeat(np.arange(len(records)), list(map(len, captions)))
        every: list[str] = [text for texts in captions for text in texts]
        texts, text_of = prompts.distinct(every, encode.as_read)
        text_embed = scores.unit(encode.encode_distinct(predictor, texts))  # [M, D]
        right = np.zeros((len(records), len(texts)), bool)
        right[owner, text_of] = True
        return {
            **counts,
            "captions": len(owner),
            "distinct_captions": len(texts),
            "synthetic_captions": sum(not r.captions for r in records),
            "image_to_text": _recalls(image_embed, text_embed, right, np.arange(len(records))),
            "text_to_image": _recalls(text_embed, image_embed, right.T, text_of),
        }


def _recalls(
    queries: np.ndarray, candidates: np.ndarray, right: np.ndarray, rows: np.ndarray
) -> dict[str, float]:
    """R@k of the queries `rows`, maybe repeated, of [Q, D], for candidates [C, D] and `right` bool [Q, C]."""
    out = {}
    for k, hits in zip(KS, rates.nearest_hits(queries, candidates, right, KS)):
        chance = rates.topk_hits(np.zeros(right.shape, np.float32), right, k)[rows]
        out |= {**rates.rate(f"r{k}", hits[rows]), f"chance_r{k}": float(chance.mean())}
    return out
