"""Runs the model of a run on images of its evaluations: accuracy of each class, and cards of regions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from grain_jax import inference
from grain_jax.core import errors, html, images, named
from grain_jax.evaluate import box_classes, encode, grounding, kinds, rates, test_sets, zeroshot
from grain_jax.inference import prompts, scores
from grain_jax.runtime import processes

_CARDS = 24  # images whose regions are shown
_PROPOSALS = 5  # of an image's patches whose boxes are shown
_EDGE = 224  # longer side of a shown image, pixels
_TEXTS = 2000  # descriptions that are compared with each region, at most


class Box(NamedTuple):
    """A box of a card."""

    xyxy: list[float]  # in [0, 1]
    text: str  # the nearest description of a region; the description of an annotated box
    cosine: float | None  # between a region and its text; None: an annotated box
    colour: int  # number of the query; for an annotated box, of the matched query, or -1
    right: bool | None = None  # whether the text of a matched region describes its box


class Card(NamedTuple):
    """An image with the boxes of its regions, and its annotated ones."""

    name: str
    uri: str
    size: tuple[int, int]
    boxes: list[Box]


class Looked(NamedTuple):
    """The results of the model for the page."""

    classes: dict[str, dict[str, float]]  # "unseen, alpha 0.5 (300 of 800 images)" -> class -> accuracy
    cards: list[Card]
    unmeasured: list[str]  # a line for each part that could not be made


@processes.alone()
def look(workdir: Any, predictor: Any, evals: Mapping[str, Any], num_images: int) -> Looked:
    """Runs the model on at most so many images of each evaluation; None: the newest checkpoint's model."""
    looked = Looked({}, [], [])
    try:
        predictor = predictor or inference.load(workdir)
    except (errors.UserError, OSError) as error:
        looked.unmeasured.append(f"model: {str(error).splitlines()[0]}")
        return looked
    for name, entry in evals.items():
        try:
            if not named.may_import(str(entry.get("kind"))):
                continue
            parsed = kinds.from_entry(entry)
            if isinstance(parsed, zeroshot.ZeroShot):
                looked.classes.update(_classes(predictor, name, parsed, num_images))
            elif isinstance(parsed, (grounding.Grounding, box_classes.Boxes)) and not looked.cards:
                looked.cards.extend(_cards(predictor, parsed))
        except (errors.UserError, OSError) as error:
            looked.unmeasured.append(f"{name}: {str(error).splitlines()[0]}")
    return looked


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the positions 0..count-1, evenly spaced."""
    return sorted(set(np.linspace(0, count - 1, min(count, wanted)).round().astype(int).tolist()))


def _classes(predictor: Any, name: str, entry: Any, limit: int) -> dict[str, dict[str, float]]:
    test_set = entry.open()
    scorer = entry.scorer(predictor, test_set)
    wanted = set(_spread(len(test_set), limit))
    every = enumerate(test_set.images(range(len(test_set))))
    chosen = [image for position, image in every if position in wanted]
    seen = encode.gather_images(predictor, chosen, label="report", regions=scorer.with_regions)
    out = {}
    regions = seen.regions.embed, seen.regions.prior
    for way, combined in scorer.of_images(seen.image_embed, *regions).items():
        hits = rates.topk_hits(combined, seen.labels, 1)
        shares = rates.of_classes(hits, hits, seen.labels, list(test_set.classes))["per_class"]
        shown = way.replace("_", " ").replace("/", ", ")
        out[f"{name}, {shown} ({len(seen.labels)} of {len(test_set)} images)"] = shares
    return out


def _cards(predictor: Any, entry: Any) -> list[Card]:
    if not predictor.has_regions:
        raise errors.UserError("the model finds no regions")
    annotated = entry.read()
    chosen = _spread(len(annotated.records), _CARDS)
    files = [test_sets.of_path(annotated.paths[i]) for i in chosen]
    seen = encode.gather_images(predictor, files, label="regions", regions=True)
    records = [annotated.records[chosen[i]] for i in seen.index]
    described = grounding.described_boxes(records, seen.sizes)
    regions = seen.regions
    if predictor.has_proposals:
        regions = scores.likeliest(regions, _PROPOSALS)
    matched, text_of = grounding.match(regions.boxes_xyxy, described)
    others = [region.description for record in annotated.records for region in record.regions]
    texts = prompts.distinct(described.texts + others, encode.as_read)[0]
    texts = texts[: max(_TEXTS, len(described.texts))]
    text_embed = scores.unit(predictor.encode_text(texts))
    cosines = scores.unit(regions.embed) @ text_embed.T  # [n, Q, T]
    cards = []
    for i, record in enumerate(records):
        queries = matched.query[matched.image == i].tolist()  # in order of rank
        right_text = dict(zip(queries, text_of[matched.image == i].tolist()))
        boxes = []
        for query, (box, row) in enumerate(zip(regions.boxes_xyxy[i], cosines[i])):
            best = int(row.argmax())
            right = right_text[query] == best if query in right_text else None
            boxes.append(Box(box.tolist(), texts[best], float(row[best]), query, right))
        of_image = described.image == i
        for rank, (box, text) in enumerate(zip(described.boxes_xyxy[of_image], described.text[of_image])):
            colour = queries[rank] if rank < len(queries) else -1
            boxes.append(Box(box.tolist(), described.texts[text], None, colour))
        small = images.to_rgb(files[seen.index[i]].load())
        small.thumbnail((_EDGE, _EDGE), PIL.Image.Resampling.LANCZOS)
        cards.append(Card(record.image, html.data_uri(small), small.size, boxes))
    return cards
