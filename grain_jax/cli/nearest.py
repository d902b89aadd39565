"""The nearest of some names to one that does not exist."""

import difflib
from collections.abc import Iterable

_NEAR = 0.7


def likeness(a: str, b: str) -> float:
    """1 for equal names, 0 for names without a common letter; 0.9 for the same letters in another order."""
    a, b = a.strip("-"), b.strip("-")
    ratio = difflib.SequenceMatcher(None, a, b).ratio()
    return max(ratio, 0.9) if sorted(a) == sorted(b) else ratio


def of(name: str, known: Iterable[str]) -> str | None:
    """The nearest name of `known`, or None where none is near."""
    best = max(known, key=lambda other: likeness(name, other), default=None)
    return best if best is not None and likeness(name, best) > _NEAR else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The words "did you mean X?", or what there is."""
    known = list(known)
    near = of(name, known)
    return f"did you mean {near}?" if near else f"there are: {', '.join(known)}"


def choice(value: str, known: Iterable[str]) -> str:
    """The words for a value that is none of `known`."""
    known = list(map(str, known))
    near = of(value, known)
    return f"got {value!r}, expected one of {', '.join(known)}" + (
        f"; did you mean {near}?" if near else ""
    )
