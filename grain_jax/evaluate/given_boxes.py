"""The embeddings of annotated boxes: by the box head, by the region that overlaps the box most, by the whole image."""

from typing import Any, NamedTuple

import numpy as np

from grain_jax.config.evals import Context
from grain_jax.core import annotations as annotations_lib
from grain_jax.evaluate import evaluators, grounding
from grain_jax.inference import scores
from grain_jax.losses import boxes


class Found(NamedTuple):
    """For each annotated box the query that overlaps it most."""

    query: np.ndarray  # int [M]
    iou: np.ndarray  # float32 [M]


class GivenBoxes(NamedTuple):
    """The annotated boxes of all readable images."""

    records: list[annotations_lib.Annotation]  # of the readable images
    counts: dict[str, Any]  # for the result
    described: grounding.Described  # M boxes
    # float32 [M, D]: "box_head" and "region", as the model has them, and "image"
    embeds: dict[str, np.ndarray]
    found: Found | None  # None: a model without region queries


def encode_boxes(entry: evaluators.AnnotatedImages, predictor: Any, context: Context) -> GivenBoxes:
    """The boxes of the annotations that lie in their images, embedded; arguments and errors as of `entry.gather`."""
    model = getattr(predictor, "model", None)  # a config.Model; test doubles may have none
    has_regions = model is None or bool(model.decoder and model.decoder.queries)
    has_head = model is not None and model.boxes.kind != "none"

    def boxes_of(record: annotations_lib.Annotation, size: tuple[int, int]) -> np.ndarray:
        return grounding.described_boxes([record], [size]).boxes_xyxy

    records, seen, counts = entry.gather(
        predictor, context, regions=has_regions, boxes_of=boxes_of if has_head else None
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
