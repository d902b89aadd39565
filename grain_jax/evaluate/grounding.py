"""Where the regions are and what they say: box IoU, Acc@0.5, region-to-description R@1, phrase grounding.

Queries are matched to an image's described boxes by the cost of training (`matching`), its weights fixed
at the paper's 5 (L1) and 2 (GIoU) whatever a run trained with, so that runs compare. Of more boxes than
queries those with the highest scores count, as in training.

A phrase is asked for once for each time that the annotations list it, with its own boxes (`phrases` of A.jsonl;
without it each described box is a phrase of its own), so that equal phrases of one image are not merged. That is
RefCOCO's protocol, in which every sentence counts with the box of its object (lichengunc/MAttNet,
lib/models/eval_dets_utils.py), and the two of Flickr30k Entities (ashkamath/mdetr, datasets/flickr_eval.py): "any
box", found by the best overlap with one of the phrase's boxes, and "merged boxes", found by the overlap with the
smallest box around all of them. All three count IoU >= 0.5 (`boxes.FOUND_IOU`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from grain_jax.evaluate import annotated as annotated_lib
from grain_jax.evaluate import encode, rates
from grain_jax.evaluate.test_sets import InputError
from grain_jax.files import annotations as annotations_lib
from grain_jax.inference import scores
from grain_jax.input_pipeline import tokenizer
from grain_jax.losses import boxes, matching

MATCH_L1, MATCH_GIOU = 5.0, 2.0  # of the matching cost (docs/method.md, Losses)
_SEED = 0  # of the boxes that chance is measured with
_AT_ONCE = 1024  # images or regions; bounds memory


class Matched(NamedTuple):
    """The described boxes that got a query, one for each entry."""

    picture: np.ndarray  # int [n], position among the readable images
    query: np.ndarray  # int [n]
    iou: np.ndarray  # float [n], of the query's box and the described one


class Described(NamedTuple):
    """Every described box of the readable images, by falling score within an image."""

    picture: np.ndarray  # int [M], position among the readable images
    rank: np.ndarray  # int [M], within the image, 0 = highest score
    boxes_xyxy: np.ndarray  # float32 [M, 4] in [0, 1]
    text: np.ndarray  # int [M], position in `texts`
    texts: list[str]  # distinct after the tokenizer's cleaning and lower-casing
    outside: int  # boxes left out because less than half of them lies in the image


class Phrases(NamedTuple):
    """What is asked for, each phrase with its boxes: the pair k says that box `box[k]` is right for `phrase[k]`."""

    phrase: np.ndarray  # int [K], 0 .. P-1, in order
    box: np.ndarray  # int [K], position among the described boxes


def evaluate(
    predictor: encode.Predictor,
    *,
    images: epath.PathLike,
    annotations: epath.PathLike,
    batch_size: int = encode.BATCH_SIZE,
) -> dict[str, Any]:
    """Compares predicted regions with the described boxes of each image.

    Args:
      predictor: the model.
      images: the folder that the annotations' paths start from.
      annotations: `A.jsonl`; images without regions are left out.
      batch_size: images at a time.

    Returns: counts, and (95% intervals of shares: `_low`, `_high`)
      `box_iou`, `box_acc50`: mean IoU of matched boxes, and the share with IoU >= 0.5;
      `chance_box_iou`: the same, with boxes of other images in place of the predicted ones;
      `region_to_description_r1`: a matched region's nearest text, among all distinct descriptions of the
        file, is its own; `chance_region_to_description_r1`;
      `phrases`: how many phrases are asked for; of none, what follows is left out;
      `phrase_iou`, `phrase_acc50`: of each phrase, the box of the best-scoring query against the phrase's
        box, of several that which it overlaps most; and the share with IoU >= 0.5;
      `chance_phrase_iou`, `chance_phrase_acc50`: a query at random in its place;
      where some phrase has several boxes, `phrases_of_several_boxes`, how many have; `phrase_acc50_any_box`, which
        is `phrase_acc50` by the name of its protocol; and `phrase_iou_merged_box`, `phrase_acc50_merged_box`
        against the smallest box around all of a phrase's boxes; with their `chance_` as above.

    Raises:
      test_sets.InputError, annotations.AnnotationError: what was given cannot be used.
    """
    annotated = annotated_lib.read_regions(images, annotations)
    unreadable: dict[str, str] = {}
    kept, seen = annotated_lib.gather(
        predictor, annotated, label="grounding", unreadable=unreadable, batch_size=batch_size
    )
    pred_boxes_xyxy, region_embed = seen.with_regions
    described, phrases = described_phrases(kept, seen.sizes)
    if not len(described.picture):
        raise InputError(f"{annotations}: every box lies outside its image")
    text_embed = scores.unit(encode.encode_distinct(predictor, described.texts))  # [T, D]

    matched, text = match(pred_boxes_xyxy, described)
    by_chance, _ = match(_boxes_of_others(described, pred_boxes_xyxy.shape), described)
    embed = scores.unit(region_embed[matched.picture, matched.query])  # [n, D]
    hits = [
        rates.topk_hits(
            embed[i : i + _AT_ONCE] @ text_embed.T,
            text[i : i + _AT_ONCE, None] == np.arange(len(text_embed)),
            1,
        )
        for i in range(0, len(embed), _AT_ONCE)
    ]
    return {
        "kind": "grounding",
        "pictures": len(kept),
        "without_regions": len(annotated.read.records) - len(annotated.records),
        "faulty_lines": annotated.read.faulty_lines,
        **encode.report_unreadable(unreadable),
        "regions": len(described.picture),
        "regions_outside": described.outside,
        "regions_matched": len(matched.iou),
        "distinct_descriptions": len(described.texts),
        "box_iou": float(matched.iou.mean()),
        "chance_box_iou": float(by_chance.iou.mean()),
        **rates.rate("box_acc50", matched.iou >= boxes.FOUND_IOU),
        "chance_box_acc50": float((by_chance.iou >= boxes.FOUND_IOU).mean()),
        **rates.rate("region_to_description_r1", np.concatenate(hits)),
        "chance_region_to_description_r1": 1 / len(described.texts),
        **_phrase_rates(phrases, described, pred_boxes_xyxy, region_embed, text_embed),
    }


def _phrase_rates(
    phrases: Phrases,
    described: Described,
    pred_boxes_xyxy: np.ndarray,
    region_embed: np.ndarray,
    text_embed: np.ndarray,
) -> dict[str, Any]:
    """The part of the result about phrases; of N images pred_boxes_xyxy [N, Q, 4], region_embed [N, Q, D]."""
    number, first, boxes_of = np.unique(phrases.phrase, return_index=True, return_counts=True)
    if not len(number):
        return {"phrases": 0}
    picture, text = (x[phrases.box[first]] for x in (described.picture, described.text))  # [P]
    pairs, pair_of = np.unique(np.stack([picture, text], axis=1), axis=0, return_inverse=True)
    similarity = np.einsum(
        "pqd,pd->pq", scores.unit(region_embed)[pairs[:, 0]], text_embed[pairs[:, 1]]
    )[pair_of.reshape(-1)]  # [P, Q]
    best = similarity == similarity.max(axis=1, keepdims=True)
    share = best / best.sum(axis=1, keepdims=True)  # ties broken at random

    true_boxes_xyxy = described.boxes_xyxy[phrases.box]  # [K, 4]
    each = _iou(pred_boxes_xyxy[picture[phrases.phrase]], true_boxes_xyxy[:, None])  # [K, Q]
    any_box = np.maximum.reduceat(each, first, axis=0)  # [P, Q]
    out = {"phrases": len(number)} | _of_protocol("", any_box, share)
    if boxes_of.max() > 1:
        low = np.minimum.reduceat(true_boxes_xyxy[:, :2], first, axis=0)
        high = np.maximum.reduceat(true_boxes_xyxy[:, 2:], first, axis=0)
        merged_xyxy = np.concatenate([low, high], axis=1)[:, None]  # [P, 1, 4]
        merged = _of_protocol("_merged_box", _iou(pred_boxes_xyxy[picture], merged_xyxy), share)
        same = {key: value for key, value in out.items() if "phrase_acc50" in key}
        out["phrases_of_several_boxes"] = int((boxes_of > 1).sum())
        out |= {k.replace("acc50", "acc50_any_box"): v for k, v in same.items()} | merged
    return out


def _of_protocol(name: str, overlap: np.ndarray, share: np.ndarray) -> dict[str, float]:
    """Rates of `overlap` [P, Q], the queries' IoU with what is right; `share` [P, Q]: how they are chosen."""
    found = overlap >= boxes.FOUND_IOU
    return {
        f"phrase_iou{name}": float((share * overlap).sum(axis=1).mean()),
        f"chance_phrase_iou{name}": float(overlap.mean()),
        **rates.rate(f"phrase_acc50{name}", (share * found).sum(axis=1)),
        f"chance_phrase_acc50{name}": float(found.mean()),
    }


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
            boxes.xyxy_to_cxcywh(jnp.asarray(pred_boxes_xyxy[part])),
            boxes.xyxy_to_cxcywh(jnp.asarray(true_boxes_xyxy[part])),
            l1=MATCH_L1,
            giou=MATCH_GIOU,
        )
        query[part] = matching.match(cost, jnp.asarray(mask[part])).query_index
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
    records: Sequence[annotations_lib.Annotation], sizes: np.ndarray | Sequence[tuple[int, int]]
) -> Described:
    """The described boxes of N images; `sizes` int [N, 2], their widths and heights in pixels."""
    return described_phrases(records, sizes)[0]


def described_phrases(
    records: Sequence[annotations_lib.Annotation], sizes: np.ndarray | Sequence[tuple[int, int]]
) -> tuple[Described, Phrases]:
    """As `described_boxes`, and the phrases that the records ask for, without those of which no box is left."""
    picture, rank, boxes_xyxy, text, texts, outside = [], [], [], [], [], 0
    place: dict[str, int] = {}
    phrase_of: list[list[int]] = []  # of each phrase its boxes
    for i, (record, size) in enumerate(zip(records, np.asarray(sizes).tolist())):
        box_of: dict[int, int] = {}  # position of a region in the record -> of its box
        ranked = sorted(enumerate(record.regions), key=lambda found: -found[1].score)
        for position, region in ranked:
            box_xyxy = annotations_lib.clip_box(region.box_xyxy, *size).box_xyxy
            if box_xyxy is None:
                outside += 1
                continue
            key = _key(region.description)
            if key not in place:
                place[key] = len(texts)
                texts.append(region.description)
            rank.append(len(box_of))
            box_of[position] = len(picture)
            picture.append(i)
            boxes_xyxy.append([x / edge for x, edge in zip(box_xyxy, (*size, *size))])
            text.append(place[key])
        phrases = [(x,) for x in range(len(record.regions))]
        for phrase in phrases if record.phrases is None else record.phrases:
            kept = [box_of[x] for x in phrase if x in box_of]
            if kept:
                phrase_of.append(kept)
    described = Described(
        np.array(picture, int),
        np.array(rank, int),
        np.array(boxes_xyxy, np.float32).reshape(-1, 4),
        np.array(text, int),
        texts,
        outside,
    )
    pairs = [(phrase, box) for phrase, kept in enumerate(phrase_of) for box in kept]
    return described, Phrases(*np.array(pairs, int).reshape(-1, 2).T)


def _boxes_of_others(described: Described, shape: tuple[int, ...]) -> np.ndarray:
    """For each image as many boxes as it has queries, drawn from the other images' described ones."""
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
        else:  # there is but one image
            corners = np.sort(random.random((queries, 2, 2), np.float32), axis=1)
            out[i] = corners.reshape(queries, 4)
    return out
