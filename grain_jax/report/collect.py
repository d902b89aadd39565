"""What a run's model does on images of its own evaluations: classes, confusions, regions, queries, attention.

Kept in `report_data.json` of the workdir, so that a second report needs neither the model nor the images.
"""

import base64
import collections
import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import errors, inference, named
from grain_jax.evaluate import annotated as annotated_lib
from grain_jax.evaluate import evaluators, grounding, rates, test_sets, zeroshot
from grain_jax.files import atomic, images
from grain_jax.inference import prompts, scores
from grain_jax.report import attention, looking
from grain_jax.report.thumbnails import Thumbnails
from grain_jax.runtime import checkpoint

FILE = "report_data.json"
PICTURES = 300  # of an evaluation that the model looks at
SHOWN = 24  # images with their regions
_VERSION = 1  # of the file's format
_PAIRS = 12  # confusions that are shown, for an evaluation and an alpha
_EXAMPLES = 3  # images of a confusion
_SMALL, _LARGE = 96, 224  # pixels of a thumbnail's longer side
_TEXTS = 2000  # descriptions that regions choose from, at most
_BEST = 3  # descriptions of a region that are shown
_SAID = 8  # descriptions that are listed for a query
_CELLS = 20  # along an edge of a query's map
_LOOKED_AT = 8  # images whose attention is kept, if that is not too much
_ATTENTION_BYTES = 500_000


class _NotThere(errors.UserError):
    """What the run cannot have, however often it is looked for; other faults may be mended."""


def collect(
    workdir: epath.PathLike,
    config: Mapping[str, Any],
    predictor: Any = None,
    *,
    step: int | None = None,
    pictures: int = PICTURES,
) -> dict[str, Any]:
    """The pass over the run's evaluations, or what an earlier one at the same step has kept.

    Args:
      workdir: of the run; its newest checkpoint is loaded if there is no `predictor`.
      config: what `config.json` holds.
      predictor: the model, where it is in memory already (`inference.Predictor`).
      step: that the predictor stands at.
      images: of each evaluation, spread over it evenly.

    Returns: JSON-ready; `lines` says what could not be made and why.
    """
    workdir = epath.Path(workdir)
    if predictor is None:
        steps = checkpoint.finished_steps(workdir)
        step = steps[-1] if steps else None
    evals = config.get("evals", {})
    asked = {"version": _VERSION, "step": step, "pictures": pictures, "evals": evals}
    asked = json.loads(json.dumps(asked))  # as it comes back
    kept = _kept(workdir / FILE)
    if predictor is None and kept and kept["asked"] == asked:
        return kept
    made: dict[str, Any] = {"asked": asked, "zeroshot": {}, "lines": {}, "whole": True}
    thumbs = Thumbnails()

    @contextlib.contextmanager
    def line(part: str):
        try:
            yield
        except (errors.UserError, OSError) as error:
            made["lines"][part] = str(error).split("\n")[0]
            made["whole"] &= isinstance(error, _NotThere)

    with line("model"):
        if predictor is None:
            predictor = inference.load(workdir)
            # An older checkpoint, where the newest one is damaged.
            made["asked"]["step"] = int(epath.Path(predictor.folder).name)
    if predictor is None:
        return made | {"thumbs": []}
    for name, entry in evals.items():
        with line(name):
            parsed = config_lib.evaluator_from_dict(entry)
            if isinstance(parsed, evaluators.ZeroShot):
                made["zeroshot"][name] = _zeroshot(predictor, parsed, thumbs, pictures)
    with line("regions"):
        made |= _regions(predictor, evals, thumbs, pictures)
    made["thumbs"] = thumbs.uris
    atomic.write_text(workdir / FILE, json.dumps(made, ensure_ascii=False) + "\n")
    return made


def _kept(path: epath.Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text())
        return kept if kept["whole"] and kept["asked"]["version"] == _VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` positions of `count`, at even distances."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def _zeroshot(
    predictor, entry: evaluators.ZeroShot, thumbs: Thumbnails, limit: int
) -> dict[str, Any]:
    """Per class and confused, for each alpha of the entry."""
    entry, _ = entry.available()
    test_set = entry.open()
    classes = list(test_set.classes)
    described = None
    if entry.descriptions:
        described = zeroshot.read_descriptions(entry.descriptions, classes, test_set.stems)
    alphas = zeroshot.check_alphas(entry.shares, entry.descriptions, entry.names)
    with_regions = min(alphas) < 1
    wanted = set(_spread(len(test_set), limit).tolist())
    chosen: list[test_sets.Image] = []
    first: dict[int, int] = {}  # class -> its first image's position
    for position, picture in enumerate(test_set.images(range(len(test_set)))):
        first.setdefault(picture.label, position)
        if position in wanted:
            chosen.append(picture)
    if -1 in first:
        raise test_sets.InputError(
            "the test set has images without a label, expected another split"
        )
    found = looking.encode(predictor, chosen, regions=with_regions)
    seen = [chosen[i] for i in found.index]
    own = np.array([picture.label for picture in seen])

    embeds = described and looking.encode_texts(predictor, described)
    of_classes = embeds
    if entry.names:
        filled = prompts.load_templates(entry.templates)
        texts = [
            prompts.class_texts(name, filled, described and described[i])
            for i, name in enumerate(classes)
        ]
        of_classes = looking.encode_texts(predictor, texts)
    global_scores = scores.global_scores(found.image_embed, scores.class_features(of_classes))
    region_scores = None
    if with_regions:
        by_query = entry.region_order == "queries"
        score = scores.region_scores if by_query else zeroshot.description_scores
        region_scores = score(found.regions.embed, embeds)

    out = {"pictures": len(seen), "of": len(test_set), "classes": len(classes), "alphas": {}}
    for alpha in alphas:
        combined = scores.combine(global_scores, region_scores, alpha)  # [n, C]
        hits = rates.topk_hits(combined, own[:, None] == np.arange(len(classes)), 1)
        out["alphas"][f"{alpha:g}"] = {
            "per_class": {
                name: [float(hits[own == c].sum()), int((own == c).sum())]
                for c, name in enumerate(classes)
                if (own == c).any()
            },
            "confusions": _confusions(combined, own, seen, test_set, first, thumbs),
        }
    return out


def _confusions(
    found: np.ndarray,
    own: np.ndarray,
    seen: Sequence[test_sets.Image],
    test_set: test_sets.TestSet,
    first: Mapping[int, int],
    thumbs: Thumbnails,
) -> list[dict[str, Any]]:
    """The most frequent pairs of a class and another that was taken for it, with images.

    Args:
      found: scores [n, C].
      own: int [n], the right classes.
      seen: the images, n.
      test_set: that they are of.
      first: class -> position of its first image in the set; a class may have none.
      thumbs: gets the images that are shown.
    """
    predicted = found.argmax(axis=1)
    wrong = np.flatnonzero(predicted != own)
    counts = collections.Counter((int(own[i]), int(predicted[i])) for i in wrong)
    totals = collections.Counter(own.tolist())
    # Of pairs that are as frequent, the surest mistakes: by how much the wrong class led.
    lead = found[np.arange(len(found)), predicted] - found[np.arange(len(found)), own]
    sureness = collections.defaultdict(float)
    for i in wrong:
        pair = int(own[i]), int(predicted[i])
        sureness[pair] = max(sureness[pair], float(lead[i]))
    out = []
    for pair in sorted(counts, key=lambda p: (-counts[p], -sureness[p]))[:_PAIRS]:
        mistaken = [i for i in wrong if (own[i], predicted[i]) == pair]
        mistaken.sort(key=lambda i: -lead[i])
        right = np.flatnonzero((own == pair[1]) & (predicted == pair[1]))
        example = None
        if len(right):
            example = seen[right[0]]
        elif pair[1] in first:
            place = first[pair[1]]
            (example,) = test_set.images(range(place, place + 1))
        out.append(
            {
                "true": test_set.classes[pair[0]],
                "predicted": test_set.classes[pair[1]],
                "count": counts[pair],
                "of": totals[pair[0]],
                "pictures": [thumbs.add(seen[i], _SMALL) for i in mistaken[:_EXAMPLES]],
                "example": example and thumbs.add(example, _SMALL),
            }
        )
    return out


def with_boxes(evals: Mapping[str, Any]) -> tuple[str, evaluators.AnnotatedRegions]:
    """The first evaluation with described boxes whose data is there, and its name."""
    for name, entry in evals.items():
        with contextlib.suppress(errors.MissingData, config_lib.ConfigError):
            parsed = config_lib.evaluator_from_dict(entry)
            if isinstance(parsed, evaluators.AnnotatedRegions):
                return name, parsed.available()[0]
    raise _NotThere("no entry of config.evals has annotated boxes (kind grounding)")


def _regions(predictor, evals, thumbs: Thumbnails, limit: int) -> dict[str, Any]:
    """`regions`, `queries` and `attention`, on the images of `with_boxes`."""
    decoder = predictor.model.decoder
    if decoder is None or not decoder.queries:
        raise _NotThere("the model has no region queries")
    name, entry = with_boxes(evals)
    annotated = annotated_lib.read_regions(*entry.paths)
    records = [annotated.records[i] for i in _spread(len(annotated.records), limit)]
    pictures = [test_sets.of_path(annotated.folder / record.image) for record in records]
    found = looking.encode(predictor, pictures)
    records, pictures = ([x[i] for i in found.index] for x in (records, pictures))
    described = grounding.described_boxes(records, found.sizes)
    matched, own_text = grounding.match(found.regions.boxes_xyxy, described)
    others = [region.description for r in annotated.records for region in r.regions]
    texts = grounding.distinct(described.texts + others)  # the first ones are described.texts
    texts = texts[: max(_TEXTS, len(described.texts))]
    text_embed = scores.unit(predictor.encode_text(texts))
    similarity = scores.unit(found.regions.embed) @ text_embed.T  # [n, Q, T]

    shown = _spread(len(records), SHOWN)
    regions = [
        {
            "name": records[p].image,
            "size": list(found.sizes[p]),
            "thumb": thumbs.add(pictures[p], _LARGE),
            "predicted": _predicted(
                found.regions.boxes_xyxy[p], similarity[p], matched, own_text, int(p)
            ),
            "true": _annotated(described, matched, int(p)),
        }
        for p in shown
    ]
    return {
        "regions": {
            "entry": name,
            "pictures": regions,
            "texts": _used_texts(regions, texts),
            "chosen_from": len(texts),
            "of": len(annotated.records),
        },
        "queries": _queries(found.regions.boxes_xyxy, similarity.argmax(axis=2), texts, matched),
        "attention": _attention(predictor, [pictures[p] for p in shown]),
    }


def _predicted(boxes_xyxy, similarity, matched, own_text, picture: int) -> list[dict[str, Any]]:
    """The regions of an image: boxes_xyxy [Q, 4], similarity [Q, T] to the texts, and what they are matched to."""
    out = []
    for q, box in enumerate(boxes_xyxy):
        best = np.argsort(-similarity[q], kind="stable")[:_BEST]
        region = {
            "box": _rounded(box),
            "best": [[int(t), round(float(similarity[q, t]), 3)] for t in best],
            "own": None,  # the text of the annotated box that it is matched to
        }
        for at in np.flatnonzero((matched.picture == picture) & (matched.query == q)):
            region["own"] = int(own_text[at])
            region["own_score"] = round(float(similarity[q, own_text[at]]), 3)
            region["iou"] = round(float(matched.iou[at]), 3)
        out.append(region)
    return out


def _annotated(described, matched, picture: int) -> list[dict[str, Any]]:
    """The annotated boxes of an image; matched ones come in the order of their rank, the others are the last."""
    mine = described.picture == picture
    queries = matched.query[matched.picture == picture].tolist()
    return [
        {"box": _rounded(box), "text": int(text), "query": query}
        for box, text, query in itertools.zip_longest(
            described.boxes_xyxy[mine], described.text[mine], queries
        )
    ]


def _used_texts(regions: list[dict[str, Any]], texts: Sequence[str]) -> list[str]:
    """The texts that the regions name, which then count in these."""
    place: dict[int, int] = {}
    at = lambda text: None if text is None else place.setdefault(text, len(place))
    for picture in regions:
        for box in picture["true"]:
            box["text"] = at(box["text"])
        for region in picture["predicted"]:
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


def _attention(predictor, pictures: Sequence[test_sets.Image]) -> dict[str, Any] | None:
    """The decoder's attention over some of the images shown, in 8 bits of each query's largest.

    None with an image tower of a user, whose tokens need not be patches of a grid.
    """
    model = predictor.model
    if named.is_external(model.image.tower):
        return None
    decoder = model.decoder
    first, side = attention.grid(model)
    each = decoder.depth * decoder.heads * (decoder.queries + 1) * (first + side * side)
    wanted = max(2, min(_LOOKED_AT, _ATTENTION_BYTES // each))
    chosen = _spread(len(pictures), wanted)
    resized = [images.resize(pictures[i].load(), model.image.image_size) for i in chosen]
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
