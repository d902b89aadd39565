"""Classification of given boxes (COCO, LVIS) by the box head, and by the region that overlaps the box most.

The descriptions in the annotations are class names. For comparison, each box is also classified by the embedding of
the whole image, which shows what regions and boxes add.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax.evaluate import annotated as annotated_lib
from grain_jax.evaluate import class_names, encode, grounding, rates
from grain_jax.evaluate.test_sets import InputError
from grain_jax.inference import prompts, scores
from grain_jax.input_pipeline import tokenizer
from grain_jax.losses import boxes

_AT_ONCE = 4096  # boxes; bounds the memory


class Found(NamedTuple):
    """For each annotated box the query that overlaps it most."""

    query: np.ndarray  # int [M]
    iou: np.ndarray  # float32 [M]


def evaluate(
    predictor: encode.Predictor,
    *,
    images: epath.PathLike,
    annotations: epath.PathLike,
    classes: str | None = None,
    templates: epath.PathLike | None = None,
    batch_size: int = encode.BATCH_SIZE,
) -> dict[str, Any]:
    """Classifies every annotated box: by the box head and by the query that overlaps the box most, as the model has them.

    Args:
      predictor: the model.
      images: the folder that the annotations' paths start from.
      annotations: `A.jsonl` whose descriptions are class names; images without regions are left out.
      classes: a class file (see `class_names`). A description stands for the class with that label or name; boxes
        with other descriptions are left out and counted. Default: the distinct descriptions.
      templates: file of prompts, one per line; default: the general set of the package.
      batch_size: images at a time.

    Returns: counts; `chance` (of top-1), `chance_top5`; under `box_head` (by the embedding of the box), `region` (by that
      of the query that overlaps the box most) and `image` (by the image embedding): `top1`, `top5`, `mean_per_class` (of
      top-1, over classes with a box) and `per_class`; the same under `groups` for each group of the class file. With
      region queries also `best_iou`, the mean IoU of the box and the box of that query; `found`, the share of boxes
      where the IoU is boxes.FOUND_IOU or more; and the same numbers under `found_boxes` for these boxes alone. Shares
      have 95% intervals (`_low`, `_high`); ties count as if broken at random.

    Raises:
      test_sets.InputError, annotations.AnnotationError, class_names.ClassNameError, prompts.PromptError: images,
        annotations, class file or prompts cannot be used.
    """
    annotated = annotated_lib.read_regions(
        images, annotations, "boxes with class names as descriptions"
    )
    filled = prompts.load_templates(templates)
    listed = None if classes is None else class_names.read(classes)
    unreadable: dict[str, str] = {}
    model = getattr(predictor, "model", None)  # a config.Model; test doubles may have none
    has_regions = model is None or bool(model.decoder and model.decoder.queries)
    has_head = model is not None and model.boxes.kind != "none"

    def boxes_of(position: int, size: tuple[int, int]) -> np.ndarray:
        return grounding.described_boxes([annotated.records[position]], [size]).boxes_xyxy

    kept, seen = annotated_lib.gather(
        predictor,
        annotated,
        label="boxes",
        unreadable=unreadable,
        regions=has_regions,
        boxes_of=boxes_of if has_head else None,
        batch_size=batch_size,
    )
    described = grounding.described_boxes(kept, seen.sizes)
    listed = listed or [class_names.Line(None, text) for text in described.texts]
    names = [line.name for line in listed]
    class_of = _classes(described.texts, listed)
    target = class_of[described.text]
    use = target >= 0
    if not use.any():
        raise InputError(
            f"{annotations}: got no box that is of one of {len(names)} classes and lies in its image,"
            " expected descriptions that are class names"
        )
    target, image = target[use], described.image[use]
    texts = [prompts.class_texts(name, filled) for name in names]
    features = scores.class_features(encode.encode_texts(predictor, texts))  # [C, D]
    embeds, found = {}, None  # [M, D] each
    if seen.box_embed is not None:
        embeds["box_head"] = seen.box_embed[use]
    if seen.regions is not None:
        found = best_query(seen.regions.boxes_xyxy[image], described.boxes_xyxy[use])
        embeds["region"] = seen.regions.embed[image, found.query]
    embeds["image"] = seen.image_embed[image]
    hits = {key: _hits(embed, features, target) for key, embed in embeds.items()}
    accuracies = lambda which: {
        "boxes": int(which.sum()),
        **{
            key: rates.of_classes(top1[which], top5[which], target[which], names)
            for key, (top1, top5) in hits.items()
        },
    }
    group = np.array([line.group for line in listed])[target]
    parts = {name: group == name for name in dict.fromkeys(line.group for line in listed)}
    return {
        "kind": "boxes",
        "pictures": len(kept),
        "without_regions": len(annotated.read.records) - len(annotated.records),
        "faulty_lines": annotated.read.faulty_lines,
        **encode.report_unreadable(unreadable),
        "boxes_outside": described.outside,
        "boxes_of_other_classes": int((~use).sum()),
        "classes": len(names),
        "classes_with_boxes": len(np.unique(target)),
        "chance": 1 / len(names),
        "chance_top5": min(1.0, 5 / len(names)),
        **({} if found is None else _of_queries(found, accuracies)),
        **accuracies(np.full(len(target), True)),
        "groups": {
            name: accuracies(which) for name, which in parts.items() if name and which.any()
        },
    }


def _of_queries(found: Found, accuracies: Callable[[np.ndarray], dict]) -> dict[str, Any]:
    """The part of the result about the queries that overlap the boxes most."""
    well = found.iou >= boxes.FOUND_IOU
    return {
        "best_iou": float(found.iou.mean()),
        **rates.rate("found", well),
        **({"found_boxes": accuracies(well)} if well.any() else {}),
    }


def best_query(pred_boxes_xyxy: np.ndarray, boxes_xyxy: np.ndarray) -> Found:
    """The query with the largest IoU; of equal ones (such as 0, without overlap) the one with the largest GIoU.

    Args:
      pred_boxes_xyxy: [M, Q, 4], the predicted boxes in the image of each box.
      boxes_xyxy: [M, 4].
    """
    query, iou = [], []
    for first in range(0, len(boxes_xyxy), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        two = pred_boxes_xyxy[part], boxes_xyxy[part, None]
        overlap = np.asarray(boxes.iou_and_union(*two)[0])  # [M, Q]
        best = overlap == overlap.max(axis=1, keepdims=True)
        query.append(np.where(best, boxes.giou(*two), -np.inf).argmax(axis=1))
        iou.append(overlap.max(axis=1))
    return Found(np.concatenate(query), np.concatenate(iou))


def _classes(texts: Sequence[str], listed: Sequence[class_names.Line]) -> np.ndarray:
    """The class of each distinct description, int [len(texts)], -1 for none."""
    place: dict[str, int] = {}
    for column in ("label", "name"):
        for i, line in enumerate(listed):
            if getattr(line, column) is not None:
                place.setdefault(_key(getattr(line, column)), i)
    return np.array([place.get(_key(text), -1) for text in texts], int)


def _key(text: str) -> str:
    return tokenizer.clean(text).lower().replace("_", " ")


def _hits(
    embed: np.ndarray, features: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Top-1 and top-5 hits [M] of embeddings [M, D] against class features [C, D]."""
    parts = []
    for first in range(0, len(embed), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        score = scores.global_scores(embed[part], features)  # [m, C]
        right = target[part, None] == np.arange(len(features))
        parts.append([rates.topk_hits(score, right, k) for k in (1, 5)])
    top1, top5 = map(np.concatenate, zip(*parts))
    return top1, top5
