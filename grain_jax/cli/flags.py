"""Fields of a command (`parser.Command`) that need more than a type and a default; numbers within bounds."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

MOST = 2**31 - 1  # of a whole number whose declaration does not say less


def flag(default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """A field with options; without a default its flag must be given.

    Args:
      default: the value without the flag.
      options: any of
        low, high: least and largest number; a whole number is at least 1 by default.
        parse: text -> value; raises ValueError with what was got and expected.
        choices: the values that it may have.
        union: the values, which are tuples, of a flag that is given several times are joined, each once.
        name: of the flag, by default the field's.
        also: another name of the flag, which no help shows.
        unless: a switch; without it the flag must be given.
    """
    return dataclasses.field(default=default, metadata=options)


def many(**options: Any) -> Any:
    """A field that is a list, empty by default: `--x A [A ...]` takes several, and may be given again."""
    return dataclasses.field(default_factory=list, metadata=options)


def share(default: float) -> Any:
    """A field for a number from 0 to 1."""
    return flag(default, low=0.0, high=1.0)


def number(kind: type[int] | type[float], low: float, high: float | None = None) -> Callable[[str], float]:
    """Parses a number in [low, high]; `high` is MOST of a whole number, else infinite."""
    if high is None:
        high = MOST if kind is int else math.inf

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            expected = "a whole number" if kind is int else "a number"
            bounds = f"in {low}..{high}" if high < math.inf else f"of at least {low:g}"
            raise ValueError(f"got {text[:40]!r}, expected {expected} {bounds}")
        return value

    return parse


def numbers(text: str) -> tuple[float, ...]:
    """ "0.5,1" -> (0.5, 1.0). Raises ValueError: got, expected."""
    try:
        parsed = tuple(map(float, text.split(",")))
    except ValueError:
        parsed = (math.nan,)
    if not all(map(math.isfinite, parsed)):
        raise ValueError(f"got {text[:40]!r}, expected numbers with commas between, as 0.5,1")
    return parsed
