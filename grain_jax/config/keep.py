"""The share of the patches that the image tower sees in training: a number, or one after another (docs/method.md)."""

from collections.abc import Callable
from typing import Any

from grain_jax.config import weights

Keep = float | tuple[tuple[float, float], ...]
BY = ("random", "grid")
EXPECTED = (
    "a share above 0 and at most 1, or pairs [[begin, share], ...] by the share of the run, the first begin 0, such as"
    " [[0, 0.5], [0.9, 1]]"
)


def of_steps(keep: Any, total_steps: int) -> list[tuple[int, Any]]:
    """(The first step, the share from there on) for each share of a run that has steps; or of pairs of what else."""
    if not isinstance(keep, tuple):
        return [(0, keep)]
    found: dict[int, Any] = {}
    for begin, share in keep:  # of two that begin with one step the second
        found[weights.first_step(begin, total_steps)] = share
    return [(first, share) for first, share in found.items() if first < total_steps]


def most(keep: Keep) -> float:
    """The largest share of a run."""
    return max(share for _, share in keep) if isinstance(keep, tuple) else keep


def parsed(value: Any, path: str, faults: list[str]) -> Any:
    """A share as a float, or pairs as tuples of floats.

    Args:
      value: as it was given.
      path: its key, for the faults.
      faults: gets a line for a fault; the value may then not be used.
    """
    if _is_share(value):
        return float(value)
    found = pairs(value, _is_share)
    if found is None:
        faults.append(f"{path}: got {value!r}, expected {EXPECTED}")
        return value
    return tuple((begin, float(share)) for begin, share in found)


def pairs(value: Any, is_good: Callable[[Any], bool]) -> list[tuple[float, Any]] | None:
    """[[begin, what], ...] where the begins are shares of a run that rise from 0 on, and each what is good; else None."""
    is_pair = lambda x: isinstance(x, (list, tuple)) and len(x) == 2 and is_good(x[1])
    if not (isinstance(value, (list, tuple)) and value and all(map(is_pair, value))):
        return None
    begins = [begin for begin, _ in value]
    if not all(type(begin) in (int, float) and 0 <= begin < 1 for begin in begins):
        return None
    if begins[0] != 0 or begins != sorted({*begins}):
        return None
    return [(float(begin), what) for begin, what in value]


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1
