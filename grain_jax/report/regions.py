"""Runs the region decoder on images with annotated boxes: predicted regions, use of the queries, attention."""

import base64
import collections
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from grain_jax import config as config_lib
from grain_jax.core import annotations as annotations_lib
from grain_jax.core import errors, named
from grain_jax.core import images as image_files
from grain_jax.evaluate import encode, evaluators, grounding, test_sets
from grain_jax.inference import prompts, scores
from grain_jax.report import attention
from grain_jax.report.thumbnails import Thumbnails

SHOWN = 24  # images whose regions the page shows
_LARGE = 224  # longer side of a thumbnail, pixels
_TEXTS = 2000  # descriptions that are compared with each region, at most
_BEST = 3  # nearest descriptions shown for a region
_SAID = 8  # most frequent nearest descriptions listed for a query
_CELLS = 20  # cells along a side of the map of a query
_LOOKED_AT = 8  # images whose attention is stored, fewer above _ATTENTION_BYTES
_ATTENTION_BYTES = 500_000  # of stored attention; two images are stored whatever they take


class NoRegions(errors.UserError):
    """The run has no regions to show. This is permanent, where other errors may be gone at the next report."""


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the positions 0..count-1, evenly spaced, int [n]."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def with_boxes(evals: Mapping[str, Any]) -> tuple[str, evaluators.AnnotatedRegions]:
    """(name, evaluator) of the first evaluation with annotated boxes whose data exists.

    Raises:
      NoRegions: there is none.
    """
    for name, entry in evals.items():
        with contextlib.suppress(errors.MissingData, config_lib.ConfigError):
            parsed = config_lib.evaluator_from_dict(entry)
            if isinstance(parsed, evaluators.AnnotatedRegions):
                return name, parsed.available()[0]
    raise NoRegions("no entry of config.evals has annotated boxes (kind grounding)")


class Looked(NamedTuple):
    """Annotated images that the model has looked at: n of them, with Q regions each, and T descriptions."""

    records: list[annotations_lib.Annotation]
    files: list[test_sets.Image]
    sizes: np.ndarray  # int [n, 2]
    boxes_xyxy: np.ndarray  # [n, Q, 4], predicted
    described: Any  # of `grounding.described_boxes`
    matched: Any  # of `grounding.match`
    own_text: np.ndarray  # int [matches], the annotated description of each match
    texts: list[str]  # the distinct descriptions, those of these images first
    text_embed: np.ndarray  # [T, D]
    similarity: np.ndarray  # cosines of regions and texts, [n, Q, T]


def look(
    predictor,
    records: Sequence[annotations_lib.Annotation],
    images: Sequence[test_sets.Image],
    wanted: int,
    most_texts: int | None = None,
) -> Looked:
    """Runs the model on `wanted` of the annotated images, evenly spaced, and matches its regions.

    Args:
      predictor: the model (see `evaluate.encode.Predictor`).
      records, images: the annotations with regions, and the image of each.
      wanted: images, at most.
      most_texts: descriptions that are compared with each region; those of the images always are. None: all.

    Raises:
      InputError: no image can be read, or the model's numbers are not finite.
    """
    chosen = spread(len(records), wanted).tolist()
    files = [images[i] for i in chosen]
    found = encode.gather_images(predictor, files, label="regions", unreadable={})
    mine = [records[chosen[i]] for i in found.index]
    described = grounding.described_boxes(mine, found.sizes)
    matched, own_text = grounding.match(found.with_regions.boxes_xyxy, described)
    others = [region.description for record in records for region in record.regions]
    texts = prompts.distinct(described.texts + others, encode.as_read)[0]
    texts = texts[: max(most_texts or len(texts), len(described.texts))]
    text_embed = scores.unit(predictor.encode_text(texts))
    similarity = scores.unit(found.with_regions.embed) @ text_embed.T
    files = [files[i] for i in found.index]
    of_images = (mine, files, found.sizes, found.with_regions.boxes_xyxy)
    return Looked(*of_images, described, matched, own_text, texts, text_embed, similarity)


def collect(predictor, evals, thumbs: Thumbnails, limit: int) -> dict[str, Any]:
    """The entries `regions`, `queries` and `attention` of the report's data, on images of `with_boxes`.

    Args:
      predictor: the model (`inference.Predictor`).
      evals: `config.evals`.
      thumbs: the thumbnails of the page; the images shown are added to it.
      limit: images used, at most.

    Raises:
      NoRegions: the model has no queries, or no evaluation has annotated boxes.
    """
    decoder = predictor.model.decoder
    if decoder is None or not decoder.queries:
        raise NoRegions("the model has no region queries")
    name, entry = with_boxes(evals)
    annotated = entry.read()
    seen = look(predictor, annotated.records, annotated.images, limit, _TEXTS)
    records, files, boxes_xyxy = seen.records, seen.files, seen.boxes_xyxy
    described, matched, similarity = seen.described, seen.matched, seen.similarity
    shown = spread(len(records), SHOWN)
    cards = [
        {
            "name": records[p].image,
            "size": seen.sizes[p].tolist(),
            "thumb": thumbs.add(files[p], _LARGE),
            "predicted": _predicted(boxes_xyxy[p], similarity[p], matched, seen.own_text, int(p)),
            "true": _annotated(described, matched, int(p)),
        }
        for p in shown
    ]
    if predictor.model.boxes.kind != "none":
        _say_given_boxes(predictor, [files[p] for p in shown], cards, seen.text_embed)
    return {
        "regions": {
            "entry": name,
            "pictures": cards,
            "texts": _used_texts(cards, seen.texts),
            "chosen_from": len(seen.texts),
            "of": len(annotated.records),
        },
        "queries": _queries(boxes_xyxy, similarity.argmax(axis=2), seen.texts, matched),
        "attention": _attention(predictor, [files[p] for p in shown]),
    }


def _used_texts(cards: list[dict[str, Any]], texts: Sequence[str]) -> list[str]:
    """The texts that `cards` refer to; changes the positions in `cards` to positions in the returned list."""
    place: dict[int, int] = {}
    at = lambda text: None if text is None else place.setdefault(text, len(place))
    for card in cards:
        for box in card["true"]:
            box["text"] = at(box["text"])
        for region in card["predicted"]:
            region["own"] = at(region["own"])
        for said in (*card["true"], *card["predicted"]):
            if "best" in said:
                said["best"] = [[at(text), cosine] for text, cosine in said["best"]]
    return [texts[text] for text in place]


def _predicted(boxes_xyxy, similarity, matched, own_text, image: int) -> list[dict[str, Any]]:
    """The regions of an image by boxes [Q, 4] and cosines [Q, T], and in `own` the text of the box that each matches."""
    out: list[dict[str, Any]] = [
        {"box": _rounded(box), "best": _best(row), "own": None}
        for box, row in zip(boxes_xyxy, similarity)
    ]
    for at in np.flatnonzero(matched.image == image):
        query, text = matched.query[at], int(own_text[at])
        score, iou = float(similarity[query, text]), float(matched.iou[at])
        out[query] |= {"own": text, "own_score": round(score, 3), "iou": round(iou, 3)}
    return out


def _annotated(described, matched, image: int) -> list[dict[str, Any]]:
    """The annotated boxes of an image: first the matched ones, in the order of the matches, then the others."""
    mine = described.image == image
    queries = matched.query[matched.image == image].tolist()
    return [
        {"box": _rounded(box), "text": int(text), "query": query}
        for box, text, query in itertools.zip_longest(
            described.boxes_xyxy[mine], described.text[mine], queries
        )
    ]


def _say_given_boxes(predictor, files: Sequence[test_sets.Image], cards, text_embed) -> None:
    """Adds to each annotated box of `cards` its nearest descriptions by the box head, `best`."""
    if predictor.sequence_length:
        pixels: Any = [predictor.resized(file.load()) for file in files]
    else:
        pixels = _resized(predictor.model, files)
    boxes = [[box["box"] for box in card["true"]] for card in cards]
    for card, embed in zip(cards, predictor.encode_boxes(pixels, boxes), strict=True):
        for box, row in zip(card["true"], scores.unit(embed) @ text_embed.T, strict=True):
            box["best"] = _best(row)


def _best(similarity: np.ndarray) -> list[list[float]]:
    """[position, cosine] of the nearest descriptions, from the cosines [T] of all."""
    best = np.argsort(-similarity, kind="stable")[:_BEST]
    return [[int(t), round(float(similarity[t]), 3)] for t in best]


def _resized(model: config_lib.Model, files: Sequence[test_sets.Image]) -> np.ndarray:
    """The images as the model takes them, uint8 [n, S, S, 3]."""
    return np.stack([image_files.resize(file.load(), model.image.image_size) for file in files])


def _rounded(box: np.ndarray) -> list[float]:
    return [round(float(x), 4) for x in box]


def _queries(boxes_xyxy, said, texts: Sequence[str], matched) -> dict[str, Any]:
    """For each query the map of its boxes [n, Q, 4], how often it is matched, and its most frequent descriptions.

    `said`, int [n, Q], has the position in `texts` of the description nearest to each region.
    """
    count, queries = said.shape
    at = (np.arange(_CELLS) + 0.5) / _CELLS
    x1, y1, x2, y2 = np.moveaxis(boxes_xyxy, -1, 0)[..., None]  # [n, Q, 1] each
    inside_x = (x1 <= at) & (at <= x2)  # [n, Q, cells]
    inside_y = (y1 <= at) & (at <= y2)
    cover = np.einsum("nqy,nqx->qyx", inside_y.astype(float), inside_x.astype(float)) / count
    out = []
    for q in range(queries):
        own, x1, y1, x2, y2 = matched.query == q, *boxes_xyxy[:, q].T
        centres = np.stack([(x1 + x2) / 2, (y1 + y2) / 2], axis=1)
        words = collections.Counter(said[:, q].tolist())
        out.append(
            {
                "map": cover[q].round(3).tolist(),
                "centres": centres.astype(float).round(3).tolist(),
                "mean_box": _rounded(boxes_xyxy[:, q].mean(axis=0)),
                "mean_area": round(float(((x2 - x1) * (y2 - y1)).mean()), 4),
                "matched": int(own.sum()),
                "iou": round(float(matched.iou[own].mean()), 4) if own.any() else None,
                "says": [[texts[t], n] for t, n in words.most_common(_SAID)],
                "different": len(words),
            }
        )
    return {"pictures": count, "queries": out}


def _attention(predictor, files: Sequence[test_sets.Image]) -> dict[str, Any] | None:
    """The attention of the decoder over some of the shown images, as 8-bit shares of the largest weight of each query.

    None with an external image tower (`module:Class`), whose tokens need not be the patches of a grid, and of images in
    their own shape, which have no grid in common.
    """
    model = predictor.model
    if named.is_external(model.image.tower) or predictor.sequence_length:
        return None
    decoder = model.decoder
    first, side = attention.grid(model)
    each = decoder.depth * decoder.heads * (decoder.queries + 1) * (first + side * side)
    wanted = max(2, min(_LOOKED_AT, _ATTENTION_BYTES // each))
    chosen = spread(len(files), wanted)
    resized = _resized(model, [files[i] for i in chosen])
    got = attention.cross_attention(model, predictor.params, resized).weights
    weights = got.transpose(1, 0, 2, 3, 4)  # [B, T, K, Q+1, N]
    most = weights.max(axis=-1, keepdims=True)
    shares = (weights / most * 255).round().astype(np.uint8)
    return {
        "layers": decoder.depth,
        "heads": decoder.heads,
        "queries": decoder.queries,
        "first": first,
        "side": side,
        "pictures": chosen.tolist(),
        "weights": [base64.b64encode(x.tobytes()).decode() for x in shares],
        "most": [[float(f"{x:.4g}") for x in m.ravel()] for m in most],
    }
