"""Collects the statistics of a set in one pass; `result` returns the content of statistics.json."""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from grain_jax.data.annotate import answers
from grain_jax.data.inspect import counting, reading
from grain_jax.input_pipeline import image_shapes, order, tokenizer

ROW_LENGTH = counting.ROW_LENGTH
LONG_DESCRIPTION = 24  # tokens; descriptions have 4 to 12
LONGEST = 256  # tokens; longer texts count as this long
TINY = 0.001  # share of the image: 7 x 7 pixels of 224 x 224, a fifth of a patch
WHOLE = 0.95  # share of the image
LONG_SHAPE = 3.0  # longer side / shorter side
GRID = 24  # cells a side of the heat maps
AREA_EDGES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # shares of the image
SCORE_BINS = 20
TOP = 20  # most frequent texts and sizes
_LEFTOVER = re.compile(
    r"[-*\u2022\u00b7#>]\s|\(?\d{1,2}[.):]\s|\*\*|(?:sure|certainly|of course)[,!]|here (?:are|is) "
    r"|(?:caption|description|subject|answer)s?\s*:"
)


class Issue:
    """A count with the place of the first occurrence."""

    def __init__(self):
        self.count, self.example = 0, ""

    def see(self, example: str) -> None:
        """Counts one occurrence."""
        self.count += 1
        self.example = self.example or example


class Texts:
    """What is counted of the texts of a kind."""

    def __init__(self):
        self.words, self.tokens = counting.Numbers(), counting.Numbers()
        self.frequent, self.distinct = counting.Frequent(), counting.Distinct()
        self.images = 0  # that have some

    def add(self, different: Iterable[str]) -> None:
        """Counts the different texts of an image."""
        self.images += bool(different)
        self.frequent.add(different)
        for text in different:
            self.distinct.add(text.encode(), text)

    def result(self) -> dict[str, Any]:
        """The results, for statistics.json."""
        return {
            "words": self.words.result(),
            "tokens": self.tokens.result(),
            "distinct": self.distinct.result(),
            "most_frequent": self.frequent.top(TOP),  # [text, images that have it]
            "most_frequent_too_low_by": self.frequent.too_low_by,
        }


class Statistics:
    """Call `add` with batches of items, then `result`.

    `issues` counts possible problems by name (see `problems`); the names of faults are `fault: CAUSE`.
    """

    def __init__(self):
        self.issues: dict[str, Issue] = collections.defaultdict(Issue)
        self.images = self.image_bytes = self.regions = self.turned = self.without_caption = 0
        self.formats: collections.Counter[str] = collections.Counter()
        self.sizes, self.copies = counting.Frequent(), counting.Distinct()
        self.widths, self.heights = counting.Numbers(), counting.Numbers()
        self.aspects = counting.Shapes()
        self.regions_per_image = counting.Numbers()
        self.negatives_per_region = counting.Numbers()
        self.texts = {kind: Texts() for kind in ("web", "synthetic", "description")}
        self.padding = counting.Padding()
        self.areas = np.zeros(len(AREA_EDGES) - 1, np.int64)
        self.shapes = np.zeros((GRID, GRID), np.int64)  # [height, width]
        self.scores = np.zeros(SCORE_BINS, np.int64)
        self.score_sum, self.score_range = 0.0, (math.inf, -math.inf)
        # Number of boxes over each cell, as differences along both axes.
        self._cover = np.zeros((GRID + 1, GRID + 1), np.int64)
        self._tokenizer = tokenizer.ClipTokenizer()

    def add_fault(self, fault: reading.Fault) -> None:
        """Counts a line or record that cannot be used."""
        self.issues[f"fault: {fault.cause}"].see(f"{fault.where}: {fault.detail}")

    def add(self, items: Sequence[reading.Item]) -> None:
        """Counts items; fastest with a few hundred at a time."""
        if not items:
            return
        texts = [texts_of(item) for item in items]
        flat = [text for of_item in texts for _, text in of_item]
        lengths = iter(self._tokenizer.encode(flat, LONGEST).lengths.tolist())
        for item, of_item in zip(items, texts, strict=True):
            self._add_image(item)
            self._add_texts(item, of_item, list(itertools.islice(lengths, len(of_item))))
        self.widths.add(item.size[0] for item in items)
        self.heights.add(item.size[1] for item in items)
        self.aspects.add(item.shape for item in items)
        self.regions_per_image.add(len(item.descriptions) for item in items)
        self.negatives_per_region.add(len(texts) for item in items for texts in item.negatives)
        self._add_boxes(items)

    def _add_image(self, item: reading.Item) -> None:
        width, height = item.size
        self.images += 1
        self.image_bytes += len(item.encoded)
        self.formats[item.format] += 1
        self.sizes.add([f"{width} x {height}"])
        self.turned += item.turned
        self.regions += len(item.descriptions)
        self.copies.add(item.encoded, item.name)
        if max(item.size) > LONG_SHAPE * min(item.size):
            self.issues["long image"].see(f"{item.where}: {width} x {height} pixels")
        if not item.descriptions:
            self.issues["no region"].see(item.where)

    def _add_texts(
        self, item: reading.Item, texts: list[tuple[str, str]], lengths: list[int]
    ) -> None:
        seen: dict[str, dict[str, None]] = {kind: {} for kind in self.texts}
        by_kind: dict[str, list[int]] = {kind: [] for kind in self.texts}
        for (kind, text), tokens in zip(texts, lengths, strict=True):
            by_kind[kind].append(tokens)
            plain = tokenizer.clean(text).lower()
            name = "description" if kind == "description" else f"{kind} caption"
            if not plain:
                self.issues[f"empty {name}"].see(item.where)
                continue
            if kind == "description" and plain in seen[kind]:
                self.issues["repeated description"].see(f"{item.where}: {text!r}")
            seen[kind][plain] = None
            self.texts[kind].words.add([len(plain.split())])
            self.texts[kind].tokens.add([tokens])
            for issue in flaws(kind, plain, tokens):
                self.issues[f"{issue} {name}"].see(f"{item.where}: {_cut(text)!r}")
        for kind, different in seen.items():
            self.texts[kind].add(different.keys())
        if not seen["web"] and not seen["synthetic"]:
            self.without_caption += 1
            self.issues["no caption"].see(item.where)
        self._add_padding(item, by_kind)

    def _add_padding(self, item: reading.Item, tokens: dict[str, list[int]]) -> None:
        kinds = [kind for kind in ("web", "synthetic") if tokens[kind]]
        caption = tokens[kinds[self.images % len(kinds)]][0] if kinds else 0
        best = np.argsort(-item.scores, kind="stable")[: counting.MAX_REGIONS]
        described = [min(tokens["description"][i], ROW_LENGTH) for i in best]
        self.padding.add(min(caption, ROW_LENGTH), described)

    def _add_boxes(self, items: Sequence[reading.Item]) -> None:
        boxes = np.concatenate([item.boxes_xyxy for item in items])
        scores = np.concatenate([item.scores for item in items]).astype(np.float64)
        regions = [(item, text) for item in items for text in item.descriptions]
        clipped = np.clip(boxes, 0, 1)
        sides = np.clip(boxes[:, 2:] - boxes[:, :2], 0, 1)  # width, height
        areas = sides.prod(axis=1)
        good = np.isfinite(boxes).all(axis=1) & (areas > 0)
        outside = good & (np.abs(boxes - clipped) > 1e-4).any(axis=1)
        odd_scores = ~((scores >= 0) & (scores <= 1))
        for issue, flags in (
            ("box without area", ~good),
            ("box outside", outside),
            ("tiny box", good & (areas < TINY)),
            ("whole-image box", good & (areas >= WHOLE)),
            ("odd score", odd_scores),
        ):
            for i in np.flatnonzero(flags):
                item, text = regions[i]
                width, height = sides[i] * item.size
                corner = ", ".join(f"{x:.3f}" for x in boxes[i, :2])
                self.issues[issue].see(
                    f"{item.where}: {_cut(text)!r}, {width:.1f} x {height:.1f} pixels"
                    f" from ({corner}) of the image, score {scores[i]:g}"
                )
        self.areas += np.histogram(areas[good], AREA_EDGES)[0]
        columns, rows = np.minimum(sides[good] * GRID, GRID - 1).astype(int).T
        np.add.at(self.shapes, (rows, columns), 1)
        low = np.minimum(np.floor(clipped[good, :2] * GRID), GRID - 1).astype(int)  # x, y
        high = np.maximum(np.ceil(clipped[good, 2:] * GRID).astype(int), low + 1)
        for x, y, sign in ((low, low, 1), (high, high, 1), (low, high, -1), (high, low, -1)):
            np.add.at(self._cover, (y[:, 1], x[:, 0]), sign)
        usual = scores[~odd_scores]
        if len(usual):
            self.scores += np.histogram(usual, SCORE_BINS, (0, 1))[0]
            self.score_sum += float(usual.sum())
            least, most = self.score_range
            self.score_range = (min(least, float(usual.min())), max(most, float(usual.max())))

    def result(self, source: reading.Source, lanes: int) -> dict[str, Any]:
        """All statistics, as a dict that can be written as JSON.

        Args:
          source: the set that was read.
          lanes: `input.lanes` of the training, for which the shards are compared.
        """
        scored, boxed = int(self.scores.sum()), int(self.areas.sum())
        low, high = self.score_range if scored else (None, None)
        mean = self.score_sum / scored if scored else None
        cover = self._cover.cumsum(axis=0).cumsum(axis=1)[:GRID, :GRID]
        areas = zip(AREA_EDGES, AREA_EDGES[1:], self.areas.tolist())
        bins = enumerate(self.scores.tolist())
        per_image = self.regions_per_image
        beyond = sum(n * max(x - counting.MAX_REGIONS, 0) for x, n in per_image.counts.items())
        web, synthetic, descriptions = self.texts.values()
        return {
            "set": {
                "path": str(source.path),
                "kind": source.kind,
                "metadata": source.metadata,
                "shards": _shards(source.shard_lengths, lanes),
            },
            "pictures": {
                "count": self.images,
                "left_out": source.total - self.images,
                "bytes": self.image_bytes,
                "turned": self.turned,
                "orientation": source.orientation,
                "formats": dict(self.formats.most_common()),
                "width": self.widths.result(),
                "height": self.heights.result(),
                "sizes": self.sizes.top(TOP),
                "shapes": {**self.aspects.result(), "squashed": source.squashed},
            },
            "captions": {
                "pictures_with_web": web.images,
                "pictures_with_synthetic": synthetic.images,
                "pictures_with_none": self.without_caption,
                "web": web.result(),
                "synthetic": synthetic.result(),
            },
            "descriptions": descriptions.result(),
            "regions": {
                "count": self.regions,
                "per_picture": per_image.result(),
                "beyond_max_regions": beyond,
                "with_negatives": self.negatives_per_region.above(0),
                "negatives_per_region": self.negatives_per_region.result(),
            },
            "boxes": {
                "area_histogram": list(map(list, areas)),
                "places": (cover / max(boxed, 1)).round(4).tolist(),
                "shapes": (self.shapes / max(boxed, 1)).round(4).tolist(),
            },
            "scores": {
                "count": scored,
                "mean": mean,
                "min": low,
                "max": high,
                "histogram": [[i / SCORE_BINS, (i + 1) / SCORE_BINS, n] for i, n in bins],
            },
            "padding": self.padding.result(),
            "duplicate_pictures": self.copies.result(),
        }


def shape_lines(shapes: dict[str, Any]) -> list[str]:
    """Aspect ratios, padding in own shape and what is recommended, in words; `shapes` of `pictures`."""
    if not shapes["count"]:
        return []
    if side := shapes["squashed"]:
        return [
            f"stored as squares of {side}, their own shape is lost; build again with --fit inside to keep it"
        ]
    ratios = ", ".join(f"{x:g} ({quantile})" for quantile, x in shapes["ratios"].items())
    padding = ", ".join(f"{length}: {share:.0%}" for length, share in shapes["padding"].items())
    long = f"{shapes['long']:.0%} of the images are longer than {image_shapes.LONG:g} : 1"
    advice = f"{long}: squares suit (input.sequence_lengths=())"
    if image_shapes.keep_shape(shapes["long"]):
        advice = f"{long}: keep their shape, input.sequence_lengths=(N,) with the N patches of the model's square"
    return [
        f"width / height {ratios}",
        f"padding in own shape by patches of {counting.PATCH} pixels: {padding}",
        f"{advice}; the configs own and finetune choose so themselves",
    ]


def flaws(kind: str, plain: str, tokens: int) -> list[str]:
    """Flaws of a caption or description: "refusal in" or "markup in", "cut" or "long".

    Args:
      kind: "web", "synthetic" or "description"; web texts are not checked for refusals and markup of a model.
      plain: the text, cleaned and in lower case.
      tokens: its length with start and end token.
    """
    found = []
    if kind != "web":
        if answers.is_refusal(plain):
            found.append("refusal in")
        elif _LEFTOVER.match(plain):
            found.append("markup in")
    if tokens > ROW_LENGTH:
        found.append("cut")
    elif kind == "description" and tokens > LONG_DESCRIPTION:
        found.append("long")
    return found


def texts_of(item: reading.Item) -> list[tuple[str, str]]:
    """(kind, text) of all texts; an empty synthetic caption means that there is none."""
    synthetic = [("synthetic", item.synthetic_caption)] if item.synthetic_caption else []
    return [
        *(("web", text) for text in item.captions),
        *synthetic,
        *(("description", text) for text in item.descriptions),
    ]


def _shards(lengths: Sequence[int], lanes: int) -> dict[str, Any]:
    """Sizes of the shards, and the least and most records of a stream of the deterministic shuffle (a lane)."""
    if not lengths:
        return {"count": 0}
    filled = [order.ShardFile(str(i), n) for i, n in enumerate(lengths) if n]
    of_lanes = None
    if len(filled) >= lanes:
        made = order.make_lanes(filled, name="this set", lanes=lanes, shards_per_block=1, seed=0)
        of_lanes = [f(lane.num_records for lane in made) for f in (min, max)]
    sizes = {"count": len(lengths), "empty": len(lengths) - len(filled)}
    sizes |= {"smallest": min(lengths), "largest": max(lengths)}
    return {**sizes, "lanes": lanes, "records_per_lane": of_lanes}


def _cut(text: str, characters: int = 90) -> str:
    return text if len(text) <= characters else text[: characters - 3] + "..."
