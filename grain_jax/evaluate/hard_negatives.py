"""Is the right description of a box nearer to it than its hard negatives?

The protocol of FG-OVD (Bianchi et al., CVPR 2024, "The Devil is in the Fine-Grained Details") for boxes that are given:
each box is compared with its description and its first N negatives; boxes with fewer are left out. The rank of the
description is 1 + the number of negatives whose score is at least its own (but for `rates.TIE`), as in
lorebianchi98/FG-OVD, evaluation/ranks.py. There detectors find the boxes, and one that was not found has the last rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epy

from grain_jax.config.evals import STANDALONE, Context, TableRow, option
from grain_jax.core import errors
from grain_jax.evaluate.evaluators import AnnotatedImages

with epy.lazy_imports():
    import numpy as np

    from grain_jax.core import annotations as annotations_lib
    from grain_jax.evaluate import box_classes, encode, rates
    from grain_jax.inference import prompts, scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardNegatives(AnnotatedImages):
    """The right description of given boxes among hard negatives."""

    left_out = "without_negatives"
    none_usable = (
        "no region has {negatives} negatives or more; expected regions with `negatives`, which grain-jax"
        " annotate --passes negatives makes; or ask for fewer"
    )
    kind: str = "hard_negatives"
    # negatives of a box, 10 as in FG-OVD; boxes with fewer are left out
    negatives: int = option(10, "N", low=1)

    @classmethod
    def rows(cls, numbers: Mapping[str, float]) -> Sequence[TableRow]:
        if "chance_mean_rank" not in numbers:  # of given boxes by their classes
            return []
        words = {"box_head": "box head", "region": "region", "image": "image"}
        return [
            TableRow(f"{key}/top1", f"right description, by the {by}", "chance", "boxes", "boxes")
            for key, by in words.items()
        ]

    def usable(self, record: annotations_lib.Annotation) -> bool:
        return any(len(region.negatives) >= self.negatives for region in record.regions)

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Compares every annotated box with its description and its negatives.

        Returns: counts; `chance` (of top-1), `chance_mean_rank`; under `box_head` (by the embedding of the box), `region`
          (by that of the query that overlaps the box most) and `image` (by the image embedding), as the model has them:
          `top1`, the share of boxes whose description is the nearest of the N + 1 texts, with a 95% interval (`_low`,
          `_high`; ties count as if broken at random), `mean_rank` and `median_rank` (1 is best; ties count as lost).
        """
        seen = box_classes.encode_boxes(self, predictor, context)
        pairs = zip(seen.described.image, seen.described.region)
        regions = [seen.records[image].regions[region] for image, region in pairs]
        use = np.array([len(region.negatives) >= self.negatives for region in regions], bool)
        lists = [
            [region.description, *region.negatives[: self.negatives]]
            for region, used in zip(regions, use)
            if used
        ]
        if not lists:
            raise errors.UserError(
                f"{self.annotations}: no box with {self.negatives} negatives or more lies in its image"
            )
        distinct, at = prompts.distinct([text for each in lists for text in each])
        embed = scores.unit(encode.encode_distinct(predictor, distinct))  # [T, D]
        texts = at.reshape(len(lists), -1)  # [M, 1 + N]
        right = np.zeros(len(lists), int)

        def measured(box_embed: np.ndarray) -> dict[str, float]:
            boxes = scores.unit(box_embed)
            cosines = np.stack([embed[own] @ box for own, box in zip(texts, boxes)])  # [M, 1 + N]
            rank = 1 + (cosines[:, 1:] >= cosines[:, :1] - rates.TIE).sum(axis=1)
            return {
                **rates.rate("top1", rates.topk_hits(cosines, right, 1)),
                "mean_rank": float(rank.mean()),
                "median_rank": float(np.median(rank)),
            }

        return {
            **seen.counts,
            "boxes": len(lists),
            "boxes_outside": seen.described.outside,
            "boxes_with_fewer_negatives": int((~use).sum()),
            "negatives": self.negatives,
            "chance": 1 / (1 + self.negatives),
            "chance_mean_rank": 1 + self.negatives / 2,
            **{key: measured(box_embed[use]) for key, box_embed in seen.embeds.items()},
        }
