"""Classification of given boxes (COCO, LVIS) by the box head, and by the region that overlaps the box most.

The descriptions in the annotations are class names. For comparison, each box is also classified by the embedding of
the whole image, which shows what regions and boxes add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epy

from grain_jax.core import errors
from grain_jax.evaluate.base import STANDALONE, Context, TableRow, option
from grain_jax.evaluate.evaluators import AnnotatedImages, AnnotatedRegions, Faults

with epy.lazy_imports():
    import numpy as np

    from grain_jax.evaluate import class_names, encode, grounding, rates
    from grain_jax.inference import prompts, scores
    from grain_jax.losses import boxes

_BOXES, _FOUND = ("boxes", "boxes"), ("found_boxes/boxes", "boxes")  # of the rows of the table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes(AnnotatedRegions):
    """Classes of given boxes, by the box head and by the nearest region."""

    example = "--annotations lvis/A.jsonl --classes lvis \\\n    --images coco/val2017"
    none_usable = "no line has a region; expected boxes with class names as descriptions"
    table = (
        TableRow("found", "found by a query, IoU >= 0.5", None, *_BOXES),
        TableRow("box_head/top1", "class of a box by the box head, top-1", "chance", *_BOXES),
        TableRow("region/top1", "class of a box by its region, top-1", "chance", *_BOXES),
        TableRow("region/top5", "class of a box by its region, top-5", "chance_top5", *_BOXES),
        TableRow("found_boxes/region/top1", "the same of those found", "chance", *_FOUND),
        TableRow("image/top1", "class of a box by its image, top-1", "chance", *_BOXES),
        TableRow("image/top5", "class of a box by its image, top-5", "chance_top5", *_BOXES),
    )
    kind: str = "boxes"
    classes: str | None = option(
        None,
        "File of class names, or a name in grain_jax/evaluate/classes; default: all descriptions.",
        "FILE",
    )
    templates: str | None = option(
        None,
        "File of prompts, one per line, with {} for the name; default: inference/templates.txt.",
        "FILE",
    )

    @property
    def files(self) -> tuple[str | None, ...]:
        return self.annotations, self.templates, self.classes

    def check(self, attempt: Faults | None = None) -> int:
        attempt = attempt or Faults()
        attempt(prompts.load_templates, self.templates)
        if self.classes is not None:
            attempt(class_names.read, self.classes)
        return super().check(attempt)

    def evaluate(self, predictor: Any, context: Context = STANDALONE) -> dict[str, Any]:
        """Classifies every box by the box head and by the query that overlaps it most, as the model has them.

        A description stands for the class with that label or name; boxes with other descriptions are left out and
        counted.

        Returns: counts; `chance` (of top-1), `chance_top5`; under `box_head` (by the embedding of the box), `region` (by
          that of the query that overlaps the box most) and `image` (by the image embedding): `top1`, `top5`,
          `mean_per_class` (of top-1, over classes with a box) and `per_class`; the same under `groups` for each group of
          the class file. With region queries also `best_iou`, the mean IoU of the box and the box of that query;
          `found`, the share of boxes where the IoU is boxes.FOUND_IOU or more; and the same numbers under `found_boxes`
          for these boxes alone. Shares have 95% intervals (`_low`, `_high`); ties count as if broken at random.
        """
        filled = prompts.load_templates(self.templates)
        listed = None if self.classes is None else class_names.read(self.classes)
        seen = encode_boxes(self, predictor, context)
        described = seen.described
        listed = listed or [class_names.Line(None, text) for text in described.texts]
        names = [line.name for line in listed]
        class_of = _classes(described.texts, listed)
        target = class_of[described.text]
        use = target >= 0
        if not use.any():
            raise errors.UserError(
                f"{self.annotations}: got no box that is of one of {len(names)} classes and lies in its image,"
                " expected descriptions that are class names"
            )
        target, found = target[use], seen.found
        texts = [prompts.class_texts(name, filled) for name in names]
        features = scores.class_features(encode.encode_texts(predictor, texts))  # [C, D]
        hits = {
            key: rates.nearest_hits(scores.unit(embed[use]), features, target)
            for key, embed in seen.embeds.items()
        }
        accuracies = lambda which: {
            "boxes": int(which.sum()),
            **{
                key: rates.of_classes(top1[which], top5[which], target[which], names)
                for key, (top1, top5) in hits.items()
            },
        }
        of_queries: dict[str, Any] = {}
        if found is not None:
            iou = found.iou[use]
            well = iou >= boxes.FOUND_IOU
            of_queries = {"best_iou": float(iou.mean()), **rates.rate("found", well)}
            of_queries |= {"found_boxes": accuracies(well)} if well.any() else {}
        group = np.array([line.group for line in listed])[target]
        parts = {name: group == name for name in dict.fromkeys(line.group for line in listed)}
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
                name: accuracies(which) for name, which in parts.items() if name and which.any()
            },
        }


def _classes(texts: Sequence[str], listed: Sequence[class_names.Line]) -> np.ndarray:
    """The class of each distinct description, int [len(texts)], -1 for none."""
    place: dict[str, int] = {}
    for column in ("label", "name"):
        for i, line in enumerate(listed):
            if getattr(line, column) is not None:
                place.setdefault(_key(getattr(line, column)), i)
    return np.array([place.get(_key(text), -1) for text in texts], int)


def _key(text: str) -> str:
    return encode.as_read(text).replace("_", " ")


class Found(NamedTuple):
    """For each annotated box the query that overlaps it most."""

    query: np.ndarray  # int [M]
    iou: np.ndarray  # float32 [M]


class GivenBoxes(NamedTuple):
    """The annotated boxes of all readable images."""

    records: list[Any]  # core.annotations.Annotation, of the readable images
    counts: dict[str, Any]  # for the result
    described: grounding.Described  # M boxes
    # float32 [M, D]: "box_head" and "region", as the model has them, and "image"
    embeds: dict[str, np.ndarray]
    found: Found | None  # None: a model without region queries


def encode_boxes(entry: AnnotatedImages, predictor: Any, context: Context) -> GivenBoxes:
    """The boxes of the annotations that lie in their images, embedded; arguments and errors as of `entry.gather`."""
    model = getattr(predictor, "model", None)  # a config.Model; test doubles may have none
    has_regions = model is None or bool(model.decoder and model.decoder.queries)
    has_head = model is not None and model.boxes.kind != "none"

    def boxes_of(record: Any, size: tuple[int, int]) -> np.ndarray:
        return grounding.described_boxes([record], [size]).boxes_xyxy

    records, seen, counts = entry.gather(
        predictor,
        context,
        regions=has_regions,
        boxes_of=boxes_of if has_head else None,
    )
    described = grounding.described_boxes(records, seen.sizes)
    embeds, found = {}, None
    if seen.box_embed is not None:
        embeds["box_head"] = seen.box_embed
    if seen.regions is not None:
        found = best_query(seen.regions.boxes_xyxy[described.image], described.boxes_xyxy)
        embeds["region"] = seen.regions.embed[described.image, found.query]
    embeds["image"] = seen.image_embed[described.image]
    return GivenBoxes(records, counts, described, embeds, found)


def best_query(pred_boxes_xyxy: np.ndarray, boxes_xyxy: np.ndarray) -> Found:
    """The query with the largest IoU; of equal ones (such as 0, without overlap) the one with the largest GIoU.

    Args:
      pred_boxes_xyxy: [M, Q, 4], the predicted boxes in the image of each box.
      boxes_xyxy: [M, 4].
    """

    def best(*two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        overlap = np.asarray(boxes.iou_and_union(*two)[0])  # [m, Q]
        most = overlap == overlap.max(axis=1, keepdims=True)
        return np.where(most, boxes.giou(*two), -np.inf).argmax(axis=1), overlap.max(axis=1)

    return Found(*scores.in_parts(best, pred_boxes_xyxy, boxes_xyxy[:, None]))
