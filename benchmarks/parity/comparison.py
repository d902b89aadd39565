"""Errors of our arrays against the reference's, and their tolerances."""

from typing import NamedTuple

import numpy as np
from etils import epath

GOLDENS = epath.Path(__file__).absolute().parent.parent.parent / "tests" / "goldens"
RELATIVE = 1e-5  # times max |reference|


def read_npz(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file of tests/goldens."""
    with (GOLDENS / name).open("rb") as file, np.load(file) as stored:
        return dict(stored)


class Comparison(NamedTuple):
    """The comparison of one of our arrays with the reference's."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return bool(self.error <= self.tolerance)


def relative(name: str, ours, reference) -> Comparison:
    """max |a - b| / max |b|."""
    worst, largest = _worst(name, ours, reference)
    return Comparison(name, worst / largest, RELATIVE)


def gradient(name: str, ours, reference) -> Comparison:
    """max |a - b| against the float32 accuracy of a gradient."""
    worst, largest = _worst(name, ours, reference)
    return Comparison(name, worst, max(1e-7, 2e-5 * largest))


def _worst(name: str, ours, reference) -> tuple[float, float]:
    """max |a - b| and max |b|, in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        raise ValueError(f"{name}: shape {ours.shape}, expected {reference.shape}")
    return np.abs(ours - reference).max(), np.abs(reference).max()
