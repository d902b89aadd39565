"""Types of arguments, each with an error that says what was expected."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from grain_jax.config.evals import ORIENTATIONS

# What --checkpoint names, in every command.
CHECKPOINT = "workdir, checkpoint or converted folder; or aviary-tiny, hf://ORG/NAME"

MOST = 2**31 - 1  # of a whole number whose declaration does not say less


def share(text: str) -> float:
    """A share, from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value <= 1:
        return value
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a share from 0 to 1")


def number(
    kind: type[int] | type[float], low: float, high: float | None = None
) -> Callable[[str], float]:
    """The type of an argument that is a number in [low, high]; `high` is MOST of a whole number, else infinite."""
    if high is None:
        high = MOST if kind is int else math.inf

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            bounds = f"in {low}..{high}" if high < math.inf else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected {what} {bounds}")
        return value

    return parse


positive = number(int, 1)
whole = number(int, 0)


def add_orientation(group: Any) -> None:
    """Declares --orientation, of the commands that read image files."""
    group.add_argument(
        "--orientation",
        choices=ORIENTATIONS,
        default=ORIENTATIONS[0],
        help="exif turns images as viewers do, and boxes are of those pixels; file takes the pixels as they are stored",
    )
