"""Is the right description of a box nearer to it than its hard negatives?

The protocol is FG-OVD's (Bianchi et al., CVPR 2024, "The Devil is in the Fine-Grained Details"). Each given
box is compared with its description and its first N negatives; boxes with fewer are left out. The rank of the
description is 1 + the number of negatives whose score is at least its own (but for `rates.TIE`), as in
lorebianchi98/FG-OVD, evaluation/ranks.py. There detectors find the boxes, and a missed box has the last rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from grain_jax.core import errors
from grain_jax.evaluate.base import option
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
    lower_is_better = ("mean_rank", "median_rank")
    kind: str = "hard_negatives"
    negatives: int = option(
        10, "Negatives per box, 10 as in FG-OVD; boxes with fewer are left out.", "N", low=1
    )

    def usable(self, record: annotations_lib.Annotation) -> bool:
        return any(len(region.negatives) >= self.negatives for region in record.regions)

    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Compares every annotated box with its description and its negatives.

        Returns: counts; `chance`, `chance_mean_rank`; and by the embeddings `box_head`, `region` and `image`,
          as in `box_classes`: `top1`, the share of boxes whose description is the best of the N + 1 texts,
          with a 95% interval; `mean_rank` and `median_rank`. Rank 1 is best; ties count as lost.
        """
        seen = box_classes.encode_boxes(self, predictor)
        described = seen.described
        regions = (
            seen.records[image].regions[region] for image, region in zip(described.image, described.region)
        )
        count = self.negatives
        texts = [(x.description, *x.negatives[:count]) if len(x.negatives) >= count else () for x in regions]
        use = np.array([bool(each) for each in texts], bool)
        if not use.any():
            raise errors.UserError(
                f"{self.annotations}: no box with {count} negatives or more lies in its image"
            )
        distinct, text = prompts.distinct([text for each in texts for text in each])
        text_embed = scores.unit(encode.encode_distinct(predictor, distinct))  # [T, D]
        of_boxes = text_embed, text.reshape(-1, 1 + count)
        return {
            **seen.counts,
            "boxes": int(use.sum()),
            "boxes_outside": described.outside,
            "boxes_with_fewer_negatives": int((~use).sum()),
            "negatives": count,
            "chance": 1 / (1 + count),
            "chance_mean_rank": 1 + count / 2,
            **{way: _ranks(scores.unit(embed[use]), *of_boxes) for way, embed in seen.embeds.items()},
        }


def _ranks(boxes: np.ndarray, text_embed: np.ndarray, text: np.ndarray) -> dict[str, float]:
    """The numbers of boxes [n, D] with texts `text` [n, 1 + N], the description first; text_embed [T, D]."""
    cosines = np.stack([text_embed[of_box] @ box for of_box, box in zip(text, boxes)])
    rank = 1 + (cosines[:, 1:] >= cosines[:, :1] - rates.TIE).sum(axis=1)
    return {
        **rates.rate("top1", rates.topk_hits(cosines, np.zeros(len(cosines), int), 1)),
        "mean_rank": float(rank.mean()),
        "median_rank": float(np.median(rank)),
    }
