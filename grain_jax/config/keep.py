"""The share of the patches that the image tower sees in training: a number, or one after another (docs/method.md)."""

from typing import Any

from grain_jax.config import weights

Keep = float | tuple[tuple[float, float], ...]
BY = ("random", "grid")
EXPECTED = (
    "a share above 0 and at most 1, or pairs [[begin, share], ...] by the share of the run, the first begin 0, such as"
    " [[0, 0.5], [0.9, 1]]"
)


def of_steps(keep: Keep, total_steps: int) -> list[tuple[int, float]]:
    """(The first step, the share from there on) for each share of a run that has steps."""
    if not isinstance(keep, tuple):
        return [(0, keep)]
    found: dict[int, float] = {}
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
    if isinstance(value, (list, tuple)) and value and all(map(_is_pair, value)):
        pairs = tuple((float(begin), float(share)) for begin, share in value)
        begins = [begin for begin, _ in pairs]
        if begins[0] == 0 and begins == sorted({*begins}):
            return pairs
    faults.append(f"{path}: got {value!r}, expected {EXPECTED}")
    return value


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _is_pair(value: Any) -> bool:
    if not (isinstance(value, (list, tuple)) and len(value) == 2 and _is_share(value[1])):
        return False
    return type(value[0]) in (int, float) and 0 <= value[0] < 1
