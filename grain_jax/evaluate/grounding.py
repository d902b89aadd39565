"""Evaluation of regions: box IoU, Acc@0.5, region-to-description R@1, phrase grounding.

The regions of a model come from its queries, or with `model.boxes.proposals` from all patches. They are
matched to the described boxes of an image by the matching cost of training, always with the paper's weights.
If an image has more boxes than regions, those with the highest scores are used, as there.

Every entry of `phrases` in A.jsonl is one phrase with its own boxes; without that key, each described box is.
A phrase is found if the IoU of the best-scoring region and its box is at least `boxes.FOUND_IOU`, as for
RefCOCO (lichengunc/MAttNet, lib/models/eval_dets_utils.py). For phrases with several boxes there are the two
protocols of Flickr30k Entities (ashkamath/mdetr, datasets/flickr_eval.py): "any box" takes the largest IoU
with one of the boxes, "merged boxes" the IoU with the smallest box around all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epy

from grain_jax.core import errors
from grain_jax.evaluate.evaluators import AnnotatedImages

with epy.lazy_imports():
    import jax.numpy as jnp
    import numpy as np
    from scipy import optimize

    from grain_jax.core import annotations as annotations_lib
    from grain_jax.core import boxes
    from grain_jax.evaluate import encode, rates
    from grain_jax.inference import prompts, scores
    from grain_jax.losses import matching

MATCH_L1, MATCH_GIOU = 5.0, 2.0  # of the matching cost (docs/method.md, Losses)
_SEED = 0  # of the random boxes that give the chance level


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grounding(AnnotatedImages):
    """Box IoU, Acc@0.5, region-to-description R@1, phrases and their boxes."""

    kind: str = "grounding"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("regions",)

    def evaluate(self, predictor: Any) -> dict[str, Any]:
        """Compares predicted regions with the described boxes of each image.

        Returns: counts, and
          `box_iou`, `box_acc50`: mean IoU of matched boxes, and the share with IoU >= 0.5 (with boxes of all
            patches, the matched ones are nearly the best);
          `chance_box_iou`: the same, with boxes of other images in place of the predicted ones;
          `region_to_description_r1`: share of matched regions whose own description is the nearest of all
            distinct descriptions of the file;
          `phrase_iou`, `phrase_acc50`, if there are `phrases`: mean IoU of the box of the best-scoring query
            and the box of the phrase, and the share with IoU >= 0.5; `chance_`: for a random query;
          `phrase_acc50_other_image`: the same for the answer in another image, half of the images away. It
            says what is right because things lie where they often lie;
          if `phrases_of_several_boxes` is not 0: `phrase_acc50_any_box`, `phrase_iou_merged_box`,
            `phrase_acc50_merged_box`.
        """
        by_box_head = predictor.grounding_head == "regions_by_box_head"
        records, seen, counts = self.gather(predictor, regions=True, predicted_boxes=by_box_head)
        pred_boxes_xyxy, region_embed, _ = seen.regions
        described = described_boxes(records, seen.sizes)
        if not len(described.image):
            raise errors.UserError(f"{self.annotations}: every box lies outside its image")
        text_embed = scores.unit(encode.encode_distinct(predictor, described.texts))  # [T, D]

        matched, text = match(pred_boxes_xyxy, described)
        by_chance, _ = match(_boxes_of_others(described, pred_boxes_xyxy.shape), described)
        embed = scores.unit(region_embed[matched.image, matched.query])  # [n, D]
        (nearest,) = rates.nearest_hits(embed, text_embed, text, (1,))
        return {
            **counts,
            "regions": len(described.image),
            "regions_outside": described.outside,
            "regions_matched": len(matched.iou),
            "distinct_descriptions": len(described.texts),
            "box_iou": float(matched.iou.mean()),
            "chance_box_iou": float(by_chance.iou.mean()),
            **rates.rate("box_acc50", matched.iou >= boxes.FOUND_IOU),
            "chance_box_acc50": float((by_chance.iou >= boxes.FOUND_IOU).mean()),
            **rates.rate("region_to_description_r1", nearest),
            "chance_region_to_description_r1": 1 / len(described.texts),
            **_of_phrases(seen, described, text_embed),
        }


def _of_phrases(seen: encode.Encoded, described: Described, text_embed: np.ndarray) -> dict[str, Any]:
    """The part of the result about phrases; text_embed [T, D]."""
    if not described.phrases:
        return {"phrases": 0}
    counts = np.array(list(map(len, described.phrases)))  # [P]
    members = np.concatenate(described.phrases)  # [K], the boxes of one phrase after another
    first = np.cumsum(counts) - counts
    image, text = described.image[members[first]], described.text[members[first]]
    boxes_xyxy, embeds, prior = seen.regions
    if len(seen.box_embed):  # by a box head
        embeds = seen.box_embed.reshape(embeds.shape)
    true_xyxy = described.boxes_xyxy[members]

    def any_box_and_share(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the queries of each phrase's image [P, Q]: best IoU with its boxes, chance to be the answer."""
        similarity = np.einsum("pqd,pd->pq", scores.unit(embeds[images]), text_embed[text]) + prior[images]
        best = similarity >= similarity.max(axis=1, keepdims=True) - rates.TIE
        each = _iou(np.repeat(boxes_xyxy[images], counts, axis=0), true_xyxy[:, None])  # [K, Q]
        share = best / best.sum(axis=1, keepdims=True)  # of several best ones, one at random
        return np.maximum.reduceat(each, first, axis=0), share

    any_box, share = any_box_and_share(image)
    other, share_of_other = any_box_and_share((image + len(embeds) // 2) % len(embeds))
    hits = share_of_other * (other >= boxes.FOUND_IOU)
    out = {"phrases": len(counts)} | _of_protocol("", any_box, share)
    out["phrase_acc50_other_image"] = float(hits.sum(axis=1).mean())
    if counts.max() > 1:
        low = np.minimum.reduceat(true_xyxy[:, :2], first, axis=0)
        high = np.maximum.reduceat(true_xyxy[:, 2:], first, axis=0)
        merged_xyxy = np.concatenate([low, high], axis=1)[:, None]  # [P, 1, 4]
        merged = _of_protocol("_merged_box", _iou(boxes_xyxy[image], merged_xyxy), share)
        same = {k: v for k, v in out.items() if "phrase_acc50" in k and "other" not in k}
        out["phrases_of_several_boxes"] = int((counts > 1).sum())
        out |= {k.replace("acc50", "acc50_any_box"): v for k, v in same.items()} | merged
    return out


def _of_protocol(name: str, overlap: np.ndarray, share: np.ndarray) -> dict[str, float]:
    """Rates of `overlap` [P, Q], the IoU of query and right box; `share` [P, Q]: the chance of a query."""
    hits = overlap >= boxes.FOUND_IOU
    return {
        f"phrase_iou{name}": float((share * overlap).sum(axis=1).mean()),
        f"chance_phrase_iou{name}": float(overlap.mean()),
        **rates.rate(f"phrase_acc50{name}", (share * hits).sum(axis=1)),
        f"chance_phrase_acc50{name}": float(hits.mean()),
    }


class Matched(NamedTuple):
    """The described boxes that are matched to a query, one per entry."""

    image: np.ndarray  # int [n], position among the readable images
    query: np.ndarray  # int [n]
    iou: np.ndarray  # float [n], of the predicted and the described box


class Described(NamedTuple):
    """Every described box of the readable images, sorted by falling score within each image."""

    image: np.ndarray  # int [M], position among the readable images
    rank: np.ndarray  # int [M], within the image, 0 = highest score
    boxes_xyxy: np.ndarray  # float32 [M, 4] in [0, 1]
    region: np.ndarray  # int [M], position in the regions of its record
    text: np.ndarray  # int [M], position in `texts`
    texts: list[str]  # distinct after the tokenizer's cleaning and lower-casing
    outside: int  # boxes left out, since less than half of them lies in the image
    phrases: Sequence[Sequence[int]] = ()  # the positions of the boxes of each among the M


def match(pred_boxes_xyxy: np.ndarray, described: Described) -> tuple[Matched, np.ndarray]:
    """Matches pred_boxes_xyxy [N, Q, 4] to the described boxes; also the texts of matched boxes, int [n]."""
    images, regions = pred_boxes_xyxy.shape[:2]
    use = described.rank < regions
    shape = images, min(regions, described.rank.max(initial=0) + 1)
    true_boxes_xyxy, mask = np.zeros((*shape, 4), np.float32), np.zeros(shape, bool)
    image, rank = described.image[use], described.rank[use]
    true_boxes_xyxy[image, rank], mask[image, rank] = described.boxes_xyxy[use], True

    def matches(predicted: np.ndarray, true: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray]:
        two = (boxes.xyxy_to_cxcywh(jnp.asarray(x)) for x in (predicted, true))
        cost = matching.cost_matrix(*two, l1=MATCH_L1, giou=MATCH_GIOU)
        if regions <= matching.EXACT_UP_TO:
            return (np.asarray(matching.match(cost, jnp.asarray(mask)).query_index),)
        query = np.zeros(mask.shape, int)  # SciPy is faster than a loop on a device
        for each, real, pairs in zip(query, mask, np.asarray(cost)):
            each[real] = optimize.linear_sum_assignment(pairs[:, real].T)[1]
        return (query,)

    (query,) = scores.in_parts(matches, pred_boxes_xyxy, true_boxes_xyxy, mask)
    query = query[image, rank]
    iou = _iou(pred_boxes_xyxy[image, query], described.boxes_xyxy[use])
    return Matched(image, query, iou), described.text[use]


def _iou(a_xyxy: np.ndarray, b_xyxy: np.ndarray) -> np.ndarray:
    return np.asarray(boxes.iou_and_union(a_xyxy, b_xyxy)[0])


def described_boxes(
    records: Sequence[annotations_lib.Annotation], sizes: np.ndarray | Sequence[tuple[int, int]]
) -> Described:
    """The described boxes and phrases of N images; `sizes` int [N, 2], widths and heights in pixels."""
    rows, phrases, outside = [], [], 0
    for i, (record, size) in enumerate(zip(records, np.asarray(sizes).tolist())):
        box_of: dict[int, int] = {}  # position of a region in the record -> position of its box
        for position, region in sorted(enumerate(record.regions), key=lambda pair: -pair[1].score):
            box_xyxy, _ = annotations_lib.clip_box(region.box_xyxy, *size)
            if box_xyxy is None:
                outside += 1
                continue
            scaled = [x / edge for x, edge in zip(box_xyxy, (*size, *size))]
            rows.append((i, len(box_of), scaled, position, region.description))
            box_of[position] = len(rows) - 1
        alone = [(x,) for x in range(len(record.regions))]
        for phrase in alone if record.phrases is None else record.phrases:
            if kept := [box_of[x] for x in phrase if x in box_of]:
                phrases.append(kept)
    image, rank, boxes_xyxy, region, descriptions = zip(*rows) if rows else [()] * 5
    texts, text = prompts.distinct(descriptions, encode.as_read)
    image, rank, region = (np.array(x, int) for x in (image, rank, region))
    boxes_xyxy = np.array(boxes_xyxy, np.float32).reshape(-1, 4)
    return Described(image, rank, boxes_xyxy, region, text, texts, outside, phrases)


def _boxes_of_others(described: Described, shape: tuple[int, ...]) -> np.ndarray:
    """For each image as many boxes as queries, drawn from the described boxes of the other images."""
    random, out = np.random.default_rng(_SEED), np.empty(shape, np.float32)
    first = np.searchsorted(described.image, np.arange(shape[0] + 1))
    for i, (start, end) in enumerate(zip(first, first[1:])):
        if others := len(described.image) - (end - start):
            drawn = random.integers(others, size=shape[1])
            out[i] = described.boxes_xyxy[drawn + (end - start) * (drawn >= start)]
        else:  # no other image has boxes: random corners
            out[i] = np.sort(random.random((shape[1], 2, 2), np.float32), axis=1).reshape(-1, 4)
    return out
