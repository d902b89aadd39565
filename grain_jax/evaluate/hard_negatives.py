"""Is the right description of a box nearer to it than its hard negatives?

The protocol of FG-OVD (Bianchi et al., CVPR 2024, "The Devil is in the Fine-Grained Details") for boxes that are given:
each box is compared with its description and its first N negatives; boxes with fewer are left out. The rank of the
description is 1 + the number of negatives whose score is at least its own (but for `rates.TIE`), as in
lorebianchi98/FG-OVD, evaluation/ranks.py. There detectors find the boxes, and one that was not found has the last rank.

Of whole captions, those are compared with the image in which a negative stands for the description.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epy

from grain_jax.core import errors
from grain_jax.evaluate.base import STANDALONE, Context, TableRow, option
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
    table = (
        *(
            TableRow(f"{key}/top1", f"right description, by the {by}", "chance", "boxes", "boxes")
            for key, by in (("box_head", "box head"), ("region", "region"), ("image", "image"))
        ),
        TableRow(
            "captions/image/top1",
            "right caption, by the image",
            "chance",
            "captions/boxes",
            "captions",
        ),
    )
    kind: str = "hard_negatives"
    negatives: int = option(
        10, "Negatives per box, 10 as in FG-OVD; boxes with fewer are left out.", "N", low=1
    )
    captions: bool = option(
        False, "Whether captions with a negative in place of the description are compared too."
    )

    def usable(self, record: annotations_lib.Annotation) -> bool:
        return any(len(region.negatives) >= self.negatives for region in record.regions)

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Compares every annotated box with its description and its negatives.

        Returns: counts; `chance` (of top-1), `chance_mean_rank`; under `box_head` (by the embedding of the box), `region`
          (by that of the query that overlaps the box most) and `image` (by the image embedding), as the model has them: `top1`, the share of boxes whose description is the best of the
          N + 1 texts, with a 95% interval (`_low`, `_high`; ties count as if broken at random), `mean_rank` and
          `median_rank` (1 is best; ties count as lost). With `captions`, under `captions` the same of captions that hold the
          description: `boxes`, how many, and `image`.
        """
        seen = box_classes.encode_boxes(self, predictor, context)
        pairs = zip(seen.described.image, seen.described.region)
        asked = [
            self._asked(seen.records[image], seen.records[image].regions[region])
            for image, region in pairs
        ]
        boxes = np.array([bool(each.descriptions) for each in asked], bool)
        if not boxes.any():
            raise errors.UserError(
                f"{self.annotations}: no box with {self.negatives} negatives or more lies in its image"
            )
        measured = self._measured(predictor, [x.descriptions for x in asked], seen.embeds)
        out = {
            **seen.counts,
            "boxes": int(boxes.sum()),
            "boxes_outside": seen.described.outside,
            "boxes_with_fewer_negatives": int((~boxes).sum()),
            "negatives": self.negatives,
            "chance": 1 / (1 + self.negatives),
            "chance_mean_rank": 1 + self.negatives / 2,
            **measured,
        }
        captions = [each.captions for each in asked]
        if any(captions):
            measured = self._measured(predictor, captions, {"image": seen.embeds["image"]})
            out["captions"] = {"boxes": sum(map(bool, captions)), **measured}
        return out

    def _measured(
        self,
        predictor: Any,
        asked: Sequence[Sequence[str]],
        embeds: Mapping[str, np.ndarray],
    ) -> dict[str, dict[str, float]]:
        """The results of the boxes with texts, by embeddings [M, D] of all boxes."""
        use = np.array([bool(each) for each in asked], bool)
        distinct, at = prompts.distinct([text for each in asked for text in each])
        embed = scores.unit(encode.encode_distinct(predictor, distinct))  # [T, D]
        texts = at.reshape(-1, 1 + self.negatives)  # [boxes with texts, 1 + N]
        out = {}
        for key, box_embed in embeds.items():
            boxes = scores.unit(box_embed[use])
            cosines = np.stack([embed[own] @ box for own, box in zip(texts, boxes)])
            out[key] = _ranked(cosines)
        return out

    def _asked(self, record: annotations_lib.Annotation, region: annotations_lib.Region) -> _Asked:
        """The texts of a box, the right one first."""
        negatives = region.negatives[: self.negatives]
        if len(negatives) < self.negatives:
            return _Asked((), ())
        captions = (*record.captions, record.synthetic_caption) if self.captions else ()
        spoken = r"\s+".join(map(re.escape, region.description.split()))
        pattern = re.compile(rf"(?<!\w){spoken}(?!\w)", re.IGNORECASE)
        said = next(filter(None, map(pattern.search, captions)), None)
        changed = ()
        if said is not None:
            start, end = said.string[: said.start()], said.string[said.end() :]
            changed = (said.string, *(start + text + end for text in negatives))
        return _Asked((region.description, *negatives), changed)


class _Asked(NamedTuple):
    """The texts that a box is compared with, 1 + N or none."""

    descriptions: tuple[str, ...]
    captions: tuple[str, ...]


def _ranked(cosines: np.ndarray) -> dict[str, float]:
    """The right one of candidates, which is the first.

    Args:
      cosines: [M, 1 + N].

    Returns: `top1`, with a 95% interval (`_low`, `_high`; ties count as if broken at random), `mean_rank` and
      `median_rank` (1 is best; ties count as lost).
    """
    rank = 1 + (cosines[:, 1:] >= cosines[:, :1] - rates.TIE).sum(axis=1)
    return {
        **rates.rate("top1", rates.topk_hits(cosines, np.zeros(len(cosines), int), 1)),
        "mean_rank": float(rank.mean()),
        "median_rank": float(np.median(rank)),
    }
