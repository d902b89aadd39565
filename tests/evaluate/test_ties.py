"""docs/evaluate.md: ties count as if broken at random (of ranks: as lost), at every batch size."""

import collections
from unittest import mock

import numpy as np
import pytest

from grain_jax.evaluate import retrieval, tables
from grain_jax.inference import scores
from tests.evaluate.stub import StubPredictor, measure, region, write_lines, write_picture

COUNT, DIM = 69, 97  # images; odd, so that BLAS sums the last columns in another order
CLASSES = "ant", "bee", "cat"
SIZES = (1, 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("ties"), np.random.default_rng(0)
    lines = []
    for i in range(COUNT):
        image, negatives = f"classes/{CLASSES[i % 3]}/{i}.png", list("negativs")
        write_picture(folder / image, i)
        halves = {"left": [0, 0, 5, 10], "right": [5, 0, 10, 10]}
        mine = [region(box, f"{i} {name}", negatives=negatives) for name, box in halves.items()]
        lines.append({"image": image, "caption": f"caption {i}", "regions": mine})
    write_lines(folder / "A.jsonl", lines)
    write_lines(folder / "D.json", [{name: [f"{name} leg"] for name in CLASSES}])
    boxes = [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]
    images = {i: random.normal(size=DIM) for i in range(COUNT)}
    regions = {i: (boxes, random.normal(size=(1, DIM)).repeat(2, 0)) for i in range(COUNT)}
    text = random.normal(size=DIM)  # every text has this embedding
    return folder, StubPredictor(images, collections.defaultdict(lambda: text, {"": text}), regions)


def _classified(outcome):
    """top-1 of three classes, whichever is right."""
    assert outcome["per_class"] == pytest.approx(dict.fromkeys(CLASSES, 1 / 3))
    return outcome["top1"], outcome["top5"]


def _zeroshot(folder, predictor, **inputs):
    inputs |= dict(images=folder / "classes", descriptions=folder / "D.json", alphas=(1.0, 0.5, 0.0))
    outcome = measure("zeroshot", predictor, **inputs)
    for result in (outcome, outcome["by_name"]):
        for key in ("alpha_1.0", "alpha_0.5", "alpha_0.0"):
            assert _classified(result[key]) == pytest.approx((1 / 3, 1))
    return outcome


def _linear_probe(folder, predictor, **inputs):
    """Images alike: the intercepts, of classes of one size, are the same but for rounding."""
    same = StubPredictor(dict.fromkeys(range(COUNT), np.ones(DIM)))
    outcome = measure("linear_probe", same, images=folder / "classes", **inputs)
    assert _classified(outcome)[0] == pytest.approx(1 / 3)
    return outcome


def _annotated(kind, **options):
    def measured(folder, predictor, **inputs):
        inputs |= dict(images=folder, annotations=folder / "A.jsonl")
        outcome = measure(kind, predictor, **inputs, **options)
        numbers = tables.scalars(outcome)
        assert {path: numbers[path] for path in EXPECTED[kind]} == pytest.approx(EXPECTED[kind])
        for way in {"image_to_text", "text_to_image"} & outcome.keys():  # not the means of chances
            outcome[way] = {key: value for key, value in outcome[way].items() if key[0] == "r"}
        return outcome

    return measured


EXPECTED = {
    "retrieval": {f"image_to_text/r{k}": k / COUNT for k in retrieval.KS},
    "hard_negatives": {  # of ranks, lost against all
        f"{key}/{group}": value
        for key in ("region", "image")
        for group, value in {"top1": 1 / 9, "mean_rank": 9, "median_rank": 9}.items()
    },
    "boxes": {"region/top1": 1 / (2 * COUNT), "image/top1": 1 / (2 * COUNT)},
    # One of two equal queries has the box.
    "grounding": {"region_to_description_r1": 1 / (2 * COUNT), "phrase_acc50": 0.5},
}
ALL = {kind: _annotated(kind) for kind in EXPECTED} | {"zeroshot": _zeroshot}
ALL |= {"linear_probe": _linear_probe, "hard_negatives": _annotated("hard_negatives", negatives=8)}


@pytest.mark.parametrize("kind", ALL)
def test_equal_scores_are_ties_at_every_batch_size(kind, data):
    outcome = []
    for size in SIZES:
        with mock.patch.object(scores, "AT_ONCE", size if kind == "retrieval" else 256):
            outcome.append(ALL[kind](*data, batch_size=size))
    assert outcome[0] == outcome[1]
