"""The report of a conversion: inputs, tolerance and verdict."""

import numpy as np
import pytest

from grain_jax.convert import parity

pytestmark = pytest.mark.quick


def test_the_error_is_relative_to_the_other_sides_largest():
    b = np.array([[3.0, 4.0], [0.0, -10.0]])
    a = b + np.array([[0.0, 0.0], [0.5, 0.0]])
    (comparison,) = parity.compare({"x": a}, {"x": b}, tolerance=0.05)
    assert comparison.error == pytest.approx(0.05) and comparison.ok
    assert comparison.cosine == pytest.approx(10 / np.sqrt(100.25))
    (comparison,) = parity.compare({"x": a}, {"x": b}, tolerance=0.049)
    assert not comparison.ok


IDS = np.array([[49406, 320, 49407]])


@pytest.mark.parametrize(
    "ours, theirs, ok",
    [
        (IDS, IDS.copy(), True),
        (IDS, IDS + [0, 1, 0], False),  # integers must be equal
        (np.array([1.0, np.nan]), np.array([1.0, 2.0]), False),
        (np.array([1.0, np.inf]), np.array([1.0, 2.0]), False),
    ],
)
def test_what_is_no_difference_and_what_is_one(ours, theirs, ok):
    (comparison,) = parity.compare({"x": ours}, {"x": theirs}, tolerance=1.0)
    assert comparison.ok == ok
    assert parity.report([comparison], "the other side").ok == ok


def test_other_names_and_shapes_are_errors():
    with pytest.raises(parity.ParityError) as error:
        parity.compare({"a": np.zeros(2), "b": np.zeros(2)}, {"b": np.zeros(3), "c": np.zeros(1)})
    assert str(error.value).split("\n") == [
        "parity: a: only one side gives it",
        "parity: c: only one side gives it",
        "parity: b: ours has shape (2,), the other side's (3,)",
    ]


def test_the_verdict_is_the_last_line():
    good = parity.compare({"x": np.ones(3)}, {"x": np.ones(3)})
    bad = parity.compare({"y": np.ones(3)}, {"y": np.zeros(3)})
    report = parity.report(good + bad, "open_clip 3.3.0")
    assert (report.ok, report.verdict) == (False, "FAILED")
    assert report.text.split("\n")[0] == "parity: our outputs against open_clip 3.3.0"
    assert report.text.split("\n")[-1] == "parity: FAILED: y"
    assert parity.report(good, "x").text.endswith("parity: PROVEN")
    report = parity.not_proven("open_clip is not installed")
    assert (report.ok, report.verdict) == (True, "NOT PROVEN")
    assert report.text.endswith("parity: NOT PROVEN. open_clip is not installed")
