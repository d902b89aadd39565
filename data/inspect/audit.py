"""Ranks regions by how far a trained model disagrees with them (docs/inspect.md).

The disagreement adds two differences of cosines. How much better does the description fit a box elsewhere in
the image? That finds boxes of other things. How much better does another text of the set fit the box? That
finds descriptions of what the image does not show.
"""

import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epy

from grain_jax.core import ahead, errors, images
from grain_jax.core.annotations import Annotation, Fault
from grain_jax.data.sources import join

with epy.lazy_imports():
    from grain_jax import inference
    from grain_jax.core import boxes
    from grain_jax.evaluate import encode
    from grain_jax.inference import batches
    from grain_jax.runtime import distributed

MOST_TEXTS = 2000  # of the set that each box is compared with, besides its own
CARDS = 50  # regions on the page
_BATCH = 64  # images
_SIDES = (1 / 3, 1 / 2, 2 / 3)  # of windows, as shares of the image; they overlap by half


class Verdict(NamedTuple):
    """What the model says of a region; boxes are xyxy in pixels."""

    disagreement: float  # (best cosine elsewhere - cosine) + (called_cosine - cosine)
    where: str  # FILE:LINE; in a record set the image's id, or its name
    image: str
    box: list[float]
    description: str
    cosine: float  # of the box and the description
    called: str  # the text that fits the box best, in lower case if it is another one
    called_cosine: float
    seen_box: list[float]  # that fits the description best; not the annotated box itself
    seen_cosine: float  # of a proposal: plus its prior
    seen_iou: float  # of the two boxes


def load(checkpoint: str) -> Any:
    """The predictor of a model with a box head. Raises UserError."""
    distributed.keep_compiled_programs()
    predictor = inference.load(checkpoint)
    if not predictor.has_box_head:
        got = "the model has no box head (model.boxes.kind is none)"
        raise errors.UserError(f"--checkpoint {checkpoint}: {got}, expected one of loss.box_description")
    return predictor


def rank(predictor: Any, items: Iterable[Any], texts: Sequence[str]) -> tuple[list[str], list[Any]]:
    """Compares every region with other boxes of its image, and with `texts`, one or more.

    It holds a batch of images, a line per region and the worst images. Faults among the items, and images
    that cannot be decoded, are left out. Raises InputError: embeddings are not finite.

    Returns: the lines of audit.tsv; and CARDS pairs (Verdict, Annotation), the largest disagreement first.
    """
    lines, worst, size = [], [], predictor.model.image.image_size

    def read(item: Annotation) -> Any:
        image = join.decode(item)
        if not isinstance(image, Fault):
            return item, images.resize(image, size), np.array(image.size * 2, np.float32)

    described = (item for item in items if isinstance(item, Annotation) and item.regions)
    with errors.out_of_memory_in_a_line("grain-jax inspect"), ThreadPoolExecutor() as pool:
        known = predictor.encode_text(list(texts))
        readable = filter(None, ahead.in_order(read, described, pool, _BATCH))
        for batch in batches.groups(readable, _BATCH, bool):
            verdicts = list(_verdicts(predictor, batch, texts, known))
            lines += [(verdict.disagreement, _line(verdict)) for verdict, _ in verdicts]
            worst = heapq.nlargest(CARDS, worst + verdicts, key=lambda pair: pair[0].disagreement)
    lines.sort(key=lambda pair: -pair[0])
    return ["\t".join(Verdict._fields), *(line for _, line in lines)], worst


def _line(verdict: Verdict) -> str:
    """Numbers with three digits, boxes as in an A.jsonl, texts in one line each."""
    show = {float: "{:.3f}".format, list: json.dumps, str: lambda x: " ".join(x.split())}
    return "\t".join(show[type(x)](x) for x in verdict)


def _verdicts(predictor: Any, batch: list, texts: Sequence[str], known: np.ndarray) -> Iterator[Any]:
    """The regions of (item, pixels, size [4]) each; `known` [T, D] are the embeddings of `texts`."""
    items, pixels, sizes = zip(*batch)
    tokens = predictor.encode_tokens(np.stack(pixels))
    every = [np.array([x.box_xyxy for x in item.regions], np.float32) / size for item, _, size in batch]
    if predictor.has_proposals:
        others, embeds, priors = predictor.encode_regions(tokens)
        embeds = [np.concatenate(pair) for pair in zip(predictor.encode_boxes(tokens, every), embeds)]
        every = [np.concatenate(pair) for pair in zip(every, others)]
    else:
        every, priors = [np.concatenate([x, windows()]) for x in every], np.zeros((len(batch), 1))
        embeds = predictor.encode_boxes(tokens, every)
    described = [[encode.as_read(x.description) for x in item.regions] for item in items]
    position = {text: i for i, text in enumerate(dict.fromkeys(sum(described, [])))}
    text_embeds = predictor.encode_text(list(position))
    batches.check_finite(text_embeds, *embeds)
    for item, size, boxes_xyxy, embed, prior, names in zip(items, sizes, every, embeds, priors, described):
        text, n = np.array([position[name] for name in names]), len(names)
        cosines = text_embeds[text] @ embed.T  # [n, n + P]
        cosines[:, n:] += prior
        cosine, to_known = cosines.diagonal(), embed[:n] @ known.T
        elsewhere, seen, iou = compared(boxes_xyxy, cosines, text)
        called = np.maximum(cosine, to_known.max(axis=1))
        for i, region in enumerate(item.regions):
            name = texts[to_known[i].argmax()] if called[i] > cosine[i] else names[i]
            verdict = Verdict(
                float(elsewhere[i] + called[i] - 2 * cosine[i]),
                item.where or item.id or item.image,
                item.image,
                [round(x, 2) for x in region.box_xyxy],
                region.description,
                float(cosine[i]),
                region.description if name == names[i] else name,
                float(called[i]),
                [round(float(x), 1) for x in boxes_xyxy[seen[i]] * size],
                float(cosines[i, seen[i]]),
                float(iou[i]),
            )
            yield verdict, item


def windows() -> np.ndarray:
    """Squares where other things may be, for models without proposals, float32 xyxy [38, 4] in [0, 1]."""
    out = []
    for side in _SIDES:
        starts = np.linspace(0, 1 - side, round(2 / side) - 1)
        x, y = map(np.ravel, np.meshgrid(starts, starts))
        out.append(np.stack([x, y, x + side, y + side], axis=1))
    return np.concatenate(out).astype(np.float32)


def compared(boxes_xyxy: np.ndarray, cosines: np.ndarray, text: np.ndarray) -> list[np.ndarray]:
    """Where the texts of an image's n annotated boxes fit best, among these and P other boxes.

    Args:
      boxes_xyxy: [n + P, 4], the annotated ones first.
      cosines: [n, n + P], of each text and every box.
      text: int [n], equal for equal texts.

    Returns: for each text the best cosine elsewhere; the position of its best box but its own; and the IoU of
      these two boxes; [n] each. Elsewhere means an IoU below boxes.FOUND_IOU with every box that has the
      text; if nothing is, the lowest cosine counts.
    """
    overlap = np.asarray(boxes.iou_and_union(boxes_xyxy[: len(text), None], boxes_xyxy)[0])
    has_text = (text[:, None] == text) @ (overlap >= boxes.FOUND_IOU)
    elsewhere = np.where(has_text, cosines.min(axis=1, keepdims=True), cosines).max(axis=1)
    seen = np.where(np.eye(*cosines.shape, dtype=bool), -np.inf, cosines).argmax(axis=1)
    return [elsewhere, seen, overlap[np.arange(len(text)), seen]]
