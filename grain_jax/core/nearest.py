"""Suggests a name for one that does not exist."""

import difflib
from collections.abc import Iterable

_NEAR = 0.65


def likeness(a: str, b: str) -> float:
    """1 for equal names, 0 for names without a common letter; 0.9 for the same letters in another order."""
    a, b = a.strip("-"), b.strip("-")
    ratio = difflib.SequenceMatcher(None, a, b).ratio()
    return max(ratio, 0.9) if sorted(a) == sorted(b) else ratio


def find(name: str, known: Iterable[str]) -> str | None:
    """The name in `known` whose last part is nearest, in the same group first; None if none is near."""
    group, _, last = name.rpartition(".")

    def near(other: str) -> tuple[float, bool]:
        owner, _, name = other.rpartition(".")
        return likeness(last, name), owner == group

    best = max(known, key=near, default=None)
    return best if best is not None and near(best)[0] > _NEAR else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "did you mean X?", or a list of the keys in the same group."""
    known = list(known)
    if near := find(name, known):
        return f"did you mean {near}?"
    beside = [key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]]
    return f"there are: {', '.join(beside or known)}"


def choice(value: str, known: Iterable[str]) -> str:
    """What an error says about a value that is not in `known`."""
    known = list(known)
    near = find(value, known)
    hint = f"; did you mean {near}?" if near else ""
    return f"got {value!r}, expected one of {', '.join(known)}{hint}"
