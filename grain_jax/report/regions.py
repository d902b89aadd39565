"""What the region decoder of a run does on images with annotated boxes: regions, queries and attention."""

import base64
import collections
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grain_jax import config as config_lib
from grain_jax import errors, named
from grain_jax.evaluate import annotated as annotated_lib
from grain_jax.evaluate import evaluators, grounding, test_sets
from grain_jax.files import images
from grain_jax.inference import scores
from grain_jax.report import attention, looking
from grain_jax.report.thumbnails import Thumbnails

SHOWN = 24  # images with their regions
_LARGE = 224  # pixels of a thumbnail's longer side
_TEXTS = 2000  # descriptions that regions choose from, at most
_BEST = 3  # descriptions of a region that are shown
_SAID = 8  # descriptions that are listed for a query
_CELLS = 20  # along an edge of a query's map
_LOOKED_AT = 8  # images whose attention is kept, if that is not too much
_ATTENTION_BYTES = 500_000


class NoRegions(errors.UserError):
    """The run has no regions to show, and a later report will not find any; other faults may be temporary."""


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` positions of `count`, at even distances."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def with_boxes(evals: Mapping[str, Any]) -> tuple[str, evaluators.AnnotatedRegions]:
    """The first evaluation with described boxes whose data is there, and its name."""
    for name, entry in evals.items():
        with contextlib.suppress(errors.MissingData, config_lib.ConfigError):
            parsed = config_lib.evaluator_from_dict(entry)
            if isinstance(parsed, evaluators.AnnotatedRegions):
                return name, parsed.available()[0]
    raise NoRegions("no entry of config.evals has annotated boxes (kind grounding)")


def collect(predictor, evals, thumbs: Thumbnails, limit: int) -> dict[str, Any]:
    """`regions`, `queries` and `attention`, on the images of `with_boxes`."""
    decoder = predictor.model.decoder
    if decoder is None or not decoder.queries:
        raise NoRegions("the model has no region queries")
    name, entry = with_boxes(evals)
    annotated = annotated_lib.read_regions(*entry.paths)
    records = [annotated.records[i] for i in spread(len(annotated.records), limit)]
    files = [test_sets.of_path(annotated.folder / record.image) for record in records]
    found = looking.encode(predictor, files)
    regions = found.with_regions
    records, files = ([x[i] for i in found.index] for x in (records, files))
    described = grounding.described_boxes(records, found.sizes)
    matched, own_text = grounding.match(regions.boxes_xyxy, described)
    others = [region.description for r in annotated.records for region in r.regions]
    texts = grounding.distinct(described.texts + others)  # the first ones are described.texts
    texts = texts[: max(_TEXTS, len(described.texts))]
    text_embed = scores.unit(predictor.encode_text(texts))
    similarity = scores.unit(regions.embed) @ text_embed.T  # [n, Q, T]

    shown = spread(len(records), SHOWN)
    cards = [
        {
            "name": records[p].image,
            "size": list(found.sizes[p]),
            "thumb": thumbs.add(files[p], _LARGE),
            "predicted": _predicted(
                regions.boxes_xyxy[p], similarity[p], matched, own_text, int(p)
            ),
            "true": _annotated(described, matched, int(p)),
        }
        for p in shown
    ]
    return {
        "regions": {
            "entry": name,
            "pictures": cards,
            "texts": _used_texts(cards, texts),
            "chosen_from": len(texts),
            "of": len(annotated.records),
        },
        "queries": _queries(regions.boxes_xyxy, similarity.argmax(axis=2), texts, matched),
        "attention": _attention(predictor, [files[p] for p in shown]),
    }


def _predicted(boxes_xyxy, similarity, matched, own_text, image: int) -> list[dict[str, Any]]:
    """The regions of an image: boxes_xyxy [Q, 4], similarity [Q, T] to the texts, and what they are matched to."""
    out = []
    for q, box in enumerate(boxes_xyxy):
        best = np.argsort(-similarity[q], kind="stable")[:_BEST]
        region = {
            "box": _rounded(box),
            "best": [[int(t), round(float(similarity[q, t]), 3)] for t in best],
            "own": None,  # the text of the annotated box that it is matched to
        }
        for at in np.flatnonzero((matched.image == image) & (matched.query == q)):
            region["own"] = int(own_text[at])
            region["own_score"] = round(float(similarity[q, own_text[at]]), 3)
            region["iou"] = round(float(matched.iou[at]), 3)
        out.append(region)
    return out


def _annotated(described, matched, image: int) -> list[dict[str, Any]]:
    """The annotated boxes of an image; matched ones come in the order of their rank, the others are the last."""
    mine = described.image == image
    queries = matched.query[matched.image == image].tolist()
    return [
        {"box": _rounded(box), "text": int(text), "query": query}
        for box, text, query in itertools.zip_longest(
            described.boxes_xyxy[mine], described.text[mine], queries
        )
    ]


def _used_texts(cards: list[dict[str, Any]], texts: Sequence[str]) -> list[str]:
    """The texts that the regions name, which then count in these."""
    place: dict[int, int] = {}
    at = lambda text: None if text is None else place.setdefault(text, len(place))
    for card in cards:
        for box in card["true"]:
            box["text"] = at(box["text"])
        for region in card["predicted"]:
            region["own"] = at(region["own"])
            region["best"] = [[at(text), cosine] for text, cosine in region["best"]]
    return [texts[text] for text in place]


def _rounded(box: np.ndarray) -> list[float]:
    return [round(float(x), 4) for x in box]


def _queries(boxes_xyxy, said, texts: Sequence[str], matched) -> dict[str, Any]:
    """For each query where its boxes lie, how often it is matched, and what it says.

    Args:
      boxes_xyxy: [n, Q, 4].
      said: int [n, Q], positions in `texts` of the nearest descriptions.
      texts: the descriptions.
      matched: as `grounding.match` returns it.
    """
    count, queries = said.shape
    at = (np.arange(_CELLS) + 0.5) / _CELLS
    x1, y1, x2, y2 = np.moveaxis(boxes_xyxy, -1, 0)[..., None]  # [n, Q, 1] each
    inside_x = (x1 <= at) & (at <= x2)  # [n, Q, cells]
    inside_y = (y1 <= at) & (at <= y2)
    cover = np.einsum("nqy,nqx->qyx", inside_y.astype(float), inside_x.astype(float)) / count
    out = []
    for q in range(queries):
        own = matched.query == q
        box = boxes_xyxy[:, q]
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
        words = collections.Counter(said[:, q].tolist()).most_common(_SAID)
        out.append(
            {
                "map": cover[q].round(3).tolist(),
                "centres": [
                    [round(float(b[0] + b[2]) / 2, 3), round(float(b[1] + b[3]) / 2, 3)]
                    for b in box
                ],
                "mean_box": _rounded(box.mean(axis=0)),
                "mean_area": round(float(area.mean()), 4),
                "matched": int(own.sum()),
                "iou": round(float(matched.iou[own].mean()), 4) if own.any() else None,
                "says": [[texts[t], n] for t, n in words],
                "different": len(set(said[:, q].tolist())),
            }
        )
    return {"pictures": count, "queries": out}


def _attention(predictor, files: Sequence[test_sets.Image]) -> dict[str, Any] | None:
    """The attention of the decoder over some of the images shown, in 8 bits of the largest of each query.

    None with an image tower of a user, whose tokens need not be patches of a grid.
    """
    model = predictor.model
    if named.is_external(model.image.tower):
        return None
    decoder = model.decoder
    first, side = attention.grid(model)
    each = decoder.depth * decoder.heads * (decoder.queries + 1) * (first + side * side)
    wanted = max(2, min(_LOOKED_AT, _ATTENTION_BYTES // each))
    chosen = spread(len(files), wanted)
    resized = [images.resize(files[i].load(), model.image.image_size) for i in chosen]
    got = attention.cross_attention(model, predictor.params, np.stack(resized)).weights
    weights = got.transpose(1, 0, 2, 3, 4)  # [B, T, K, Q+1, N]
    most = weights.max(axis=-1, keepdims=True)
    return {
        "layers": decoder.depth,
        "heads": decoder.heads,
        "queries": decoder.queries,
        "first": first,
        "side": side,
        "pictures": chosen.tolist(),
        "weights": [
            base64.b64encode((w / m * 255).round().astype(np.uint8).tobytes()).decode()
            for w, m in zip(weights, most)
        ],
        "most": [[float(f"{x:.4g}") for x in m.ravel()] for m in most],
    }
