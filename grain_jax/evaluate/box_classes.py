"""Texts of given boxes: their classes (COCO, LVIS), and their descriptions among hard negatives (FG-OVD).

A box has up to three embeddings: of the box head, of the region that overlaps it most, and of the whole
image, which shows what regions and boxes add.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epy

from grain_jax import config
from grain_jax.core import errors
from grain_jax.evaluate.base import TEMPLATES, option
from grain_jax.evaluate.evaluators import AnnotatedImages, faults_of

with epy.lazy_imports():
    import numpy as np

    from grain_jax.core import annotations as annotations_lib
    from grain_jax.core import boxes
    from grain_jax.evaluate import class_names, encode, grounding, rates
    from grain_jax.inference import prompts, scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes(AnnotatedImages):
    """Classes of given boxes, by the box head and by the nearest region."""

    example = "--annotations lvis/A.jsonl --classes lvis \\\n    --images coco/val2017"
    none_usable = "no line has a region; expected boxes with class names as descriptions"
    kind: str = "boxes"
    classes: str | None = option(None, "File of class names, or lvis; default: the descriptions.", "FILE")
    templates: str | None = option(None, TEMPLATES, "FILE")

    @property
    def needs(self) -> tuple[str, ...]:
        return "regions", "boxes"

    def check(self, model: Any = None) -> int:
        classes = lambda: self.classes and class_names.read(self.classes)
        config.raise_faults(faults_of(lambda: prompts.load_templates(self.templates), classes))
        return super().check(model)

    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Classifies every box whose description is the label or the name of a class.

        Returns: counts; `chance`, `chance_top5`; and the rates of `rates.of_classes` by `box_head`, `region`
          and `image`, as the model has them. `groups` has the same for each group of the class file. Region
          queries add `best_iou`, the mean IoU with the query that overlaps the box most, and `found`, the
          share with an IoU of at least boxes.FOUND_IOU.
        """
        templates = prompts.load_templates(self.templates)
        lines = None if self.classes is None else class_names.read(self.classes)
        seen = encode_boxes(self, predictor)
        described = seen.described
        lines = lines or [class_names.Line(None, text) for text in described.texts]
        names = [line.name for line in lines]
        target = _classes(described.texts, lines)[described.text]
        use = target >= 0
        if not use.any():
            got = f"got no box that is of one of {len(names)} classes and lies in its image"
            raise errors.UserError(f"{self.annotations}: {got}, expected descriptions that are class names")
        target = target[use]
        encode_all = functools.partial(encode.encode_distinct, predictor)
        features = prompts.embed_classes(encode_all, names, templates)  # [C, D]
        hits = {
            way: rates.nearest_hits(scores.unit(embed[use]), features, target)
            for way, embed in seen.embeds.items()
        }

        def accuracies(which: np.ndarray) -> dict[str, Any]:
            of_classes = lambda top1, top5: rates.of_classes(top1[which], top5[which], target[which], names)
            return {"boxes": int(which.sum()), **{way: of_classes(*each) for way, each in hits.items()}}

        of_queries: dict[str, Any] = {}
        if seen.iou is not None:
            share = rates.rate("found", seen.iou[use] >= boxes.FOUND_IOU)
            of_queries = {"best_iou": float(seen.iou[use].mean()), **share}
        group = np.array([line.group for line in lines])[target]
        return {
            **seen.counts,
            "boxes_outside": described.outside,
            "boxes_of_other_classes": int((~use).sum()),
            "classes": len(names),
            "classes_with_boxes": len(np.unique(target)),
            **rates.chance_of_classes(len(names)),
            **of_queries,
            **accuracies(np.full(len(target), True)),
            "groups": {
                name: accuracies(group == name)
                for name in dict.fromkeys(line.group for line in lines)
                if name and (group == name).any()
            },
        }


def _classes(texts: Sequence[str], lines: Sequence[class_names.Line]) -> np.ndarray:
    """The class of each distinct description, int [len(texts)], -1 for none."""
    normal = lambda text: encode.as_read(text).replace("_", " ")
    position: dict[str, int] = {}
    for column in ("label", "name"):
        for i, line in enumerate(lines):
            position.setdefault(normal(getattr(line, column) or line.name), i)
    return np.array([position.get(normal(text), -1) for text in texts], int)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardNegatives(AnnotatedImages):
    """The right description of given boxes among hard negatives.

    The protocol is FG-OVD's (Bianchi et al., CVPR 2024). The rank of a description is 1 + the number of its
    first N negatives whose score is at least its own (but for `rates.TIE`), as in lorebianchi98/FG-OVD,
    evaluation/ranks.py. There detectors find the boxes, and a missed box has the last rank.
    """

    left_out = "without_negatives"
    none_usable = (
        "no region has {negatives} negatives or more; expected regions with `negatives`, which grain-jax"
        " annotate --passes negatives makes; or ask for fewer"
    )
    lower_is_better = ("mean_rank", "median_rank")
    kind: str = "hard_negatives"
    negatives: int = option(10, "Negatives per box; boxes with fewer are left out.", "N", low=1)

    def usable(self, record: annotations_lib.Annotation) -> bool:
        return any(len(region.negatives) >= self.negatives for region in record.regions)

    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Compares every annotated box with its description and its negatives.

        Returns: counts; `chance`, `chance_mean_rank`; and by `box_head`, `region` and `image`, as the model
          has them: `top1`, the share of boxes whose description is the best of the N + 1 texts; `mean_rank`
          and `median_rank`. Rank 1 is best; ties count as lost.
        """
        seen = encode_boxes(self, predictor)
        described = seen.described
        pairs, count = zip(described.image, described.region), self.negatives
        regions = (seen.records[image].regions[region] for image, region in pairs)
        texts = [(x.description, *x.negatives[:count]) if len(x.negatives) >= count else () for x in regions]
        use = np.array([bool(each) for each in texts], bool)
        if not use.any():
            fault = f"no box with {count} negatives or more lies in its image"
            raise errors.UserError(f"{self.annotations}: {fault}")
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


class GivenBoxes(NamedTuple):
    """The annotated boxes of all readable images."""

    records: list[annotations_lib.Annotation]  # of the readable images
    counts: dict[str, Any]  # for the result
    described: grounding.Described  # M boxes
    embeds: dict[str, np.ndarray]  # float32 [M, D]: "image", and if the model has them "box_head", "region"
    iou: np.ndarray | None  # float32 [M], with the best query; None: a model without region queries


def encode_boxes(entry: AnnotatedImages, predictor: Any) -> GivenBoxes:
    """The annotated boxes that lie in their images, embedded; arguments and errors as in `entry.gather`."""

    boxes_of = lambda record, size: grounding.described_boxes([record], [size]).boxes_xyxy
    embedded = boxes_of if predictor.has_box_head else None
    records, seen, counts = entry.gather(predictor, regions=predictor.has_regions, boxes_of=embedded)
    described = grounding.described_boxes(records, seen.sizes)
    embeds, iou = {}, None
    if predictor.has_box_head:
        embeds["box_head"] = seen.box_embed
    if predictor.has_regions:
        query, iou = best_query(seen.regions.boxes_xyxy[described.image], described.boxes_xyxy)
        embeds["region"] = seen.regions.embed[described.image, query]
    embeds["image"] = seen.image_embed[described.image]
    return GivenBoxes(records, counts, described, embeds, iou)


def best_query(pred_boxes_xyxy: np.ndarray, boxes_xyxy: np.ndarray) -> list[np.ndarray]:
    """For boxes [M, 4] the query of [M, Q, 4] with the largest IoU (if equal, GIoU), and that IoU."""

    def best(*two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        overlap = np.asarray(boxes.iou_and_union(*two)[0])  # [m, Q]
        most = overlap == overlap.max(axis=1, keepdims=True)
        return np.where(most, boxes.giou(*two), -np.inf).argmax(axis=1), overlap.max(axis=1)

    return scores.in_parts(best, pred_boxes_xyxy, boxes_xyxy[:, None])
