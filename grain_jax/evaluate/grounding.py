"""Where the regions are and what they say: box IoU, Acc@0.5, region-to-description R@1, phrase grounding.

Queries are matched to a picture's described boxes by the cost of training (`matching`), its weights fixed
at the paper's 5 (L1) and 2 (GIoU) whatever a run trained with, so that runs compare. Of more boxes than
queries those with the highest scores count, as in training.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from grain_jax import annotations as annotations_lib
from grain_jax import boxes, matching
from grain_jax.evaluate import base, scores
from grain_jax.input_pipeline import tokenizer

MATCH_L1, MATCH_GIOU = 5.0, 2.0  # of the matching cost (method.md, Losses)
_SEED = 0  # of the boxes that chance is measured with
_AT_ONCE = 1024  # pictures or regions; bounds memory


class Matched(NamedTuple):
    """The described boxes that got a query, one for each entry."""

    picture: np.ndarray  # int [n], position among the readable pictures
    query: np.ndarray  # int [n]
    iou: np.ndarray  # float [n], of the query's box and the described one


class Described(NamedTuple):
    """Every described box of the readable pictures, by falling score within a picture."""

    picture: np.ndarray  # int [M], position among the readable pictures
    rank: np.ndarray  # int [M], within the picture, 0 = highest score
    boxes_xyxy: np.ndarray  # float32 [M, 4] in [0, 1]
    text: np.ndarray  # int [M], position in `texts`
    texts: list[str]  # distinct after the tokenizer's cleaning and lower-casing
    outside: int  # boxes left out because less than half of them lies in the picture


def evaluate(
    predictor: Any,
    *,
    images: epath.PathLike,
    annotations: epath.PathLike,
    batch_size: int = base.BATCH_SIZE,
) -> dict[str, Any]:
    """Compares predicted regions with the described boxes of each picture.

    Args:
      predictor: the model (see `base`).
      images: the folder that the annotations' paths start from.
      annotations: `A.jsonl`; pictures without regions are left out.
      batch_size: pictures at a time.

    Returns: counts, and (95% intervals of shares: `_low`, `_high`)
      `box_iou`, `box_acc50`: mean IoU of matched boxes, and the share with IoU >= 0.5;
      `chance_box_iou`: the same, with boxes of other pictures in place of the predicted ones;
      `region_to_description_r1`: a matched region's nearest text, among all distinct descriptions of the
        file, is its own; `chance_region_to_description_r1`;
      `phrase_iou`, `phrase_acc50`: of each description of a picture, the box of the best-scoring query,
        against the described box that it overlaps most, where several have that description ("any
        box", as is usual on Flickr30k Entities);
      `chance_phrase_iou`, `chance_phrase_acc50`: a query at random in its place.

    Raises:
      base.InputError, annotations.AnnotationError: what was given cannot be used.
    """
    every, records, folder = read(images, annotations)
    unreadable: dict[str, str] = {}
    batches = base.encode_pictures(
        predictor,
        [folder / r.image for r in records],
        label="grounding",
        unreadable=unreadable,
        batch_size=batch_size,
    )
    found = base.gather(
        dict(index=batch.index, sizes=np.array(batch.sizes), **batch.regions._asdict())
        for batch in batches
    )
    kept = [records[i] for i in found["index"]]
    sizes = [(width, height) for width, height in found["sizes"].tolist()]
    pred_boxes_xyxy, region_embed = found["boxes_xyxy"], found["embed"]
    described = described_boxes(kept, sizes)
    if not len(described.picture):
        raise base.InputError(f"{annotations}: every box lies outside its picture")
    text_embed = scores.unit(base.encode_distinct(predictor, described.texts))  # [T, D]

    matched, text = match(pred_boxes_xyxy, described)
    by_chance, _ = match(_boxes_of_others(described, pred_boxes_xyxy.shape), described)
    embed = scores.unit(region_embed[matched.picture, matched.query])  # [n, D]
    hits = [
        base.topk_hits(
            embed[i : i + _AT_ONCE] @ text_embed.T,
            text[i : i + _AT_ONCE, None] == np.arange(len(text_embed)),
            1,
        )
        for i in range(0, len(embed), _AT_ONCE)
    ]
    # Phrase grounding: [P, Q] scores and overlaps of the queries of each phrase's picture.
    phrases, phrase_of = np.unique(
        np.stack([described.picture, described.text], axis=1), axis=0, return_inverse=True
    )
    similarity = np.einsum(
        "pqd,pd->pq", scores.unit(region_embed)[phrases[:, 0]], text_embed[phrases[:, 1]]
    )
    overlap = np.zeros(similarity.shape, np.float32)
    each = _iou(pred_boxes_xyxy[described.picture], described.boxes_xyxy[:, None])  # [M, Q]
    np.maximum.at(overlap, phrase_of.reshape(-1), each)
    best = similarity == similarity.max(axis=1, keepdims=True)
    share = best / best.sum(axis=1, keepdims=True)  # ties broken at random
    return {
        "kind": "grounding",
        "pictures": len(kept),
        "without_regions": len(every.records) - len(records),
        "faulty_lines": every.faulty_lines,
        **base.report_unreadable(unreadable),
        "regions": len(described.picture),
        "regions_outside": described.outside,
        "regions_matched": len(matched.iou),
        "distinct_descriptions": len(described.texts),
        "phrases": len(phrases),
        "box_iou": float(matched.iou.mean()),
        "chance_box_iou": float(by_chance.iou.mean()),
        **base.rate("box_acc50", matched.iou >= 0.5),
        "chance_box_acc50": float((by_chance.iou >= 0.5).mean()),
        **base.rate("region_to_description_r1", np.concatenate(hits)),
        "chance_region_to_description_r1": 1 / len(described.texts),
        "phrase_iou": float((share * overlap).sum(axis=1).mean()),
        "chance_phrase_iou": float(overlap.mean()),
        **base.rate("phrase_acc50", (share * (overlap >= 0.5)).sum(axis=1)),
        "chance_phrase_acc50": float((overlap >= 0.5).mean()),
    }


def read(images: epath.PathLike, annotations: epath.PathLike) -> base.Annotated:
    """The annotations with a region; errors as in `evaluate`."""
    return base.read_annotations(
        images,
        annotations,
        lambda record: record.regions,
        "no line has a region; expected described boxes",
    )


def match(pred_boxes_xyxy: np.ndarray, described: Described) -> tuple[Matched, np.ndarray]:
    """Matches pred_boxes_xyxy [N, Q, 4] to the described boxes; also the matched ones' texts, int [n]."""
    count, queries = pred_boxes_xyxy.shape[:2]
    true_boxes_xyxy = np.zeros((count, queries, 4), np.float32)
    text = np.zeros((count, queries), int)
    mask = np.zeros((count, queries), bool)
    use = described.rank < queries
    at = described.picture[use], described.rank[use]
    true_boxes_xyxy[at], text[at], mask[at] = described.boxes_xyxy[use], described.text[use], True
    query = np.zeros((count, queries), int)
    for first in range(0, count, _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        cost = matching.cost_matrix(
            boxes.xyxy_to_cxcywh(pred_boxes_xyxy[part]),
            boxes.xyxy_to_cxcywh(true_boxes_xyxy[part]),
            l1=MATCH_L1,
            giou=MATCH_GIOU,
        )
        query[part] = matching.match(cost, mask[part]).query_index
    picture, rank = np.nonzero(mask)
    query = query[picture, rank]
    iou = _iou(pred_boxes_xyxy[picture, query], true_boxes_xyxy[picture, rank])
    return Matched(picture, query, iou), text[picture, rank]


def _iou(a_xyxy: np.ndarray, b_xyxy: np.ndarray) -> np.ndarray:
    return np.asarray(boxes.iou_and_union(a_xyxy, b_xyxy)[0])


def distinct(texts: Sequence[str]) -> list[str]:
    """The first of each set of texts that the tokenizer's cleaning and lower-casing makes equal."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(_key(text), text)
    return list(first.values())


def _key(text: str) -> str:
    return tokenizer.clean(text).lower()


def described_boxes(
    records: Sequence[annotations_lib.Annotation], sizes: Sequence[tuple[int, int]]
) -> Described:
    """The described boxes of pictures; `sizes`: each picture's width and height in pixels."""
    picture, rank, boxes_xyxy, text, texts, outside = [], [], [], [], [], 0
    place: dict[str, int] = {}
    for i, (record, size) in enumerate(zip(records, sizes)):
        order = 0
        for region in sorted(record.regions, key=lambda r: -r.score):
            box_xyxy = annotations_lib.clip_box(region.box_xyxy, *size).box_xyxy
            if box_xyxy is None:
                outside += 1
                continue
            key = _key(region.description)
            if key not in place:
                place[key] = len(texts)
                texts.append(region.description)
            picture.append(i)
            rank.append(order)
            boxes_xyxy.append([x / edge for x, edge in zip(box_xyxy, (*size, *size))])
            text.append(place[key])
            order += 1
    return Described(
        np.array(picture, int),
        np.array(rank, int),
        np.array(boxes_xyxy, np.float32).reshape(-1, 4),
        np.array(text, int),
        texts,
        outside,
    )


def _boxes_of_others(described: Described, shape: tuple[int, ...]) -> np.ndarray:
    """For each picture as many boxes as it has queries, drawn from the other pictures' described ones."""
    random = np.random.default_rng(_SEED)
    count, queries, _ = shape
    first = np.searchsorted(described.picture, np.arange(count + 1))
    out = np.empty(shape, np.float32)
    for i in range(count):
        own = first[i + 1] - first[i]
        others = len(described.picture) - own
        if others:
            drawn = random.integers(others, size=queries)
            out[i] = described.boxes_xyxy[drawn + own * (drawn >= first[i])]
        else:  # there is but one picture
            corners = np.sort(random.random((queries, 2, 2), np.float32), axis=1)
            out[i] = corners.reshape(queries, 4)
    return out
