"""Hand-computed diagnostics of a stub predictor, and what a run remembers from one evaluation to the next."""

import json
import math

import numpy as np
import pytest

from grain_jax.evaluate import diagnostics, tables
from tests.evaluate.stub import StubPredictor, annotate, measure, region

LEFT, RIGHT, AWAY = [0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.4, 0.4, 0.6, 0.6]
TEXTS = {"beak": [1, 0, 0], "tail": [0, 1, 0], "crest": [0, 0, 1]}


@pytest.fixture
def annotated(tmp_path):
    """Three images of a left half (beak, beak, crest); the first two have a right half (tail) too."""
    half = lambda j, word: region([10 * j, 0, 10 * j + 10, 10], word, 0.9 - 0.1 * j)
    phrase = ("beak", "tail"), ("Beak", "tail"), ("crest",)
    annotate(tmp_path, [{"regions": [half(*x) for x in enumerate(mine)]} for mine in phrase])
    return tmp_path


def _predictor(swapped=()):
    """Query 0 sees left halves and query 1 right ones, but the other way round in the `swapped` images."""
    regions = {}
    for i in range(3):
        boxes, embed = [LEFT, RIGHT, AWAY], [[1, 0, 0], [0.4, 0.2, 0.3], [0, 0, 1]]
        if i == 1:
            boxes[0] = [0, 0, 0.25, 1]  # IoU of exactly 0.5 with the left half, which counts
        if i in swapped:
            boxes[:2] = boxes[1::-1]
        regions[i] = boxes, embed
    return StubPredictor({i: [1, 0, 0] for i in range(3)}, TEXTS, regions)


def _evaluate(folder, swapped=(), **options):
    return measure(
        "diagnostics", _predictor(swapped), images=folder, annotations=folder / "A.jsonl", **options
    )


def test_hand_computed(annotated):
    result = _evaluate(annotated)
    assert result["pictures"] == 3 and result["distinct_descriptions"] == 3
    assert result["regions"] == 5 == result["regions_matched"]
    assert result["matched_iou"] == pytest.approx((1 + 1 + 0.5 + 1 + 1) / 5)
    assert result["matched_iou50"] == 1.0
    # Query 0 says beak: right twice, wrong of the crest. Query 1 says beak, crest, tail: its tails come third.
    assert result["region_to_description_r1"] == pytest.approx(2 / 5)
    # All three texts are among the first five.
    assert result["region_to_description_r5"] == 1 == result["chance_region_to_description_r5"]
    assert result["chance_region_to_description_r1"] == pytest.approx(1 / 3)
    entropy = lambda *p: -sum(x * math.log(x) for x in p)
    assert result["query_usage_entropy"] == pytest.approx(entropy(0.6, 0.4) / math.log(3))
    assert result["description_entropy"] == pytest.approx(entropy(0.4, 0.4, 0.2))
    left, right, away = (result["query"][str(q)] for q in range(3))
    assert left["share"] == pytest.approx(0.6) and right["share"] == pytest.approx(0.4)
    assert away == {"share": 0.0}
    # Predicted boxes of query 0: centres .25, .125, .25 and widths .5, .25, .5.
    assert left["cx"] == pytest.approx(0.625 / 3) and left["w"] == pytest.approx(1.25 / 3)
    assert left["w_spread"] == pytest.approx(np.std([0.5, 0.25, 0.5]))
    assert (left["cy"], left["h"], left["h_spread"]) == (0.5, 1, 0)
    assert right["cx"] == 0.75 and right["cx_spread"] == 0
    assert left["descriptions"] == [["beak", 2], ["crest", 1]]
    assert left["description_entropy"] == pytest.approx(entropy(2 / 3, 1 / 3))
    assert right["descriptions"] == [["tail", 2]] and right["description_entropy"] == 0
    assert "matching_stability" not in result
    numbers = tables.scalars(result)  # what a training run logs
    assert numbers["query/0/share"] == left["share"]
    assert not [name for name in numbers if name.endswith("descriptions") and "/" in name]
    assert _evaluate(annotated, batch_size=1) == result


def test_stability_since_the_evaluation_before(annotated):
    path = annotated / "run" / "diagnostics" / "test.json"
    run = lambda step, swapped: _evaluate(annotated, swapped, state_path=path, step=step)
    assert "matching_stability" not in run(10, ())
    second = run(20, (0,))  # the first image's two regions change places
    assert second["matching_stability"] == pytest.approx(3 / 5)
    assert second["stability_since_step"] == 10
    # Shares of the queries are 3/5 and 2/5 both times.
    assert second["chance_matching_stability"] == pytest.approx(0.6**2 + 0.4**2)
    third = run(30, (0, 2))
    assert third["matching_stability"] == pytest.approx(4 / 5)
    assert third["chance_matching_stability"] == pytest.approx(0.6 * 0.4 + 0.4 * 0.6)
    assert json.loads(path.read_text())["result"] == third  # with texts, for a report
    # Resumed at step 10: the same numbers again, and the file knows of no later step.
    assert run(20, (0,)) == second
    assert [e["step"] for e in json.loads(path.read_text())["evaluations"]] == [10, 20]
    assert run(30, (0, 2)) == third
    assert "matching_stability" not in run(5, ())  # begun anew in the same folder


def test_what_cannot_be_compared_is_not(annotated, capsys):
    path = annotated / "test.json"
    _evaluate(annotated, state_path=path, step=1)
    lines = (annotated / "A.jsonl").read_text().splitlines()
    (annotated / "A.jsonl").write_text("\n".join(lines[:2]) + "\n")  # other regions
    assert "matching_stability" not in _evaluate(annotated, state_path=path, step=2)
    path.write_text("{")
    assert "matching_stability" not in _evaluate(annotated, state_path=path, step=3)
    assert "test.json: damaged; matching stability starts anew" in capsys.readouterr().err
    assert _evaluate(annotated, state_path=path, step=4)["matching_stability"] == 1


def test_only_the_last_evaluations_are_kept(annotated, monkeypatch):
    monkeypatch.setattr(diagnostics, "KEPT", 2)
    path = annotated / "test.json"
    for step in (1, 2, 3):
        _evaluate(annotated, state_path=path, step=step)
    assert [e["step"] for e in json.loads(path.read_text())["evaluations"]] == [2, 3]
