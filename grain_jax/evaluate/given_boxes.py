"""The embeddings of annotated boxes: by the box head, by the region that overlaps the box most, by the whole image."""

from typing import NamedTuple

import numpy as np

from grain_jax.evaluate import annotated as annotated_lib
from grain_jax.evaluate import encode, grounding
from grain_jax.files import annotations as annotations_lib
from grain_jax.losses import boxes

_AT_ONCE = 4096  # boxes; bounds the memory


class Found(NamedTuple):
    """For each annotated box the query that overlaps it most."""

    query: np.ndarray  # int [M]
    iou: np.ndarray  # float32 [M]


class Encoded(NamedTuple):
    """The annotated boxes of all readable images."""

    records: list[annotations_lib.Annotation]  # of the readable images
    described: grounding.Described  # M boxes
    embeds: dict[
        str, np.ndarray
    ]  # float32 [M, D]: "box_head" and "region", as the model has them, and "image"
    found: Found | None  # None: a model without region queries

    @property
    def pictures(self) -> int:
        """Number of readable images."""
        return len(self.records)


def encode_boxes(
    predictor: encode.Predictor,
    annotated: annotated_lib.Annotated,
    *,
    label: str,
    unreadable: dict[str, str],
    batch_size: int,
) -> Encoded:
    """The boxes of the annotations that lie in their images, embedded; arguments as of `encode.encode_images`."""
    model = getattr(predictor, "model", None)  # a config.Model; test doubles may have none
    has_regions = model is None or bool(model.decoder and model.decoder.queries)
    has_head = model is not None and model.boxes.kind != "none"

    def boxes_of(position: int, size: tuple[int, int]) -> np.ndarray:
        return grounding.described_boxes([annotated.records[position]], [size]).boxes_xyxy

    records, seen = annotated_lib.gather(
        predictor,
        annotated,
        label=label,
        unreadable=unreadable,
        regions=has_regions,
        boxes_of=boxes_of if has_head else None,
        batch_size=batch_size,
    )
    described = grounding.described_boxes(records, seen.sizes)
    embeds, found = {}, None
    if seen.box_embed is not None:
        embeds["box_head"] = seen.box_embed
    if seen.regions is not None:
        found = best_query(seen.regions.boxes_xyxy[described.image], described.boxes_xyxy)
        embeds["region"] = seen.regions.embed[described.image, found.query]
    embeds["image"] = seen.image_embed[described.image]
    return Encoded(records, described, embeds, found)


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
