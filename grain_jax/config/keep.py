"""What the image tower sees of an image in a step of training (docs/method.md): a share of its patches, and N of them.

Both are one for the run, or pairs of [begin, what] by the share of the run.
"""

from collections.abc import Callable, Sequence
from typing import Any

from grain_jax.config import weights

Keep = float | tuple[tuple[float, float], ...]
Lengths = tuple[int, ...] | tuple[tuple[float, tuple[int, ...]], ...]
BY = ("random", "grid")
EXPECTED = (
    "a share above 0 and at most 1, or pairs [[begin, share], ...] by the share of the run, the first begin 0, such as"
    " [[0, 0.5], [0.9, 1]]"
)
EXPECTED_LENGTHS = (
    "numbers of patches (N, ...), or pairs [[begin, [N, ...]], ...] by the share of the run, the first begin 0, such as"
    " [[0, [64]], [0.8, [64, 196]]]"
)


def of_steps(keep: Any, total_steps: int) -> list[tuple[int, Any]]:
    """(The first step, the share from there on) for each share of a run that has steps; or of pairs of what else."""
    if not isinstance(keep, tuple):
        return [(0, keep)]
    found: dict[int, Any] = {}
    for begin, share in keep:  # of two that begin with one step the second
        found[weights.first_step(begin, total_steps)] = share
    return [(first, share) for first, share in found.items() if first < total_steps]


def together(keep: Keep, lengths: Lengths) -> list[tuple[float, tuple[int, ...]]]:
    """(Share, lengths) of each stretch of a run in which both stay."""
    shares = keep if isinstance(keep, tuple) else ((0.0, keep),)
    of_lengths = stretches(lengths)
    at = lambda pairs, begin: [what for first, what in pairs if first <= begin][-1]
    begins = sorted({begin for begin, _ in (*shares, *of_lengths)})
    return [(at(shares, begin), at(of_lengths, begin)) for begin in begins]


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


def stretches(lengths: Lengths | None) -> Sequence[tuple[float, tuple[int, ...]]]:
    """(Begin, numbers) of each stretch of a run, of `input.sequence_lengths`; () of squares."""
    found: Any = lengths or ()
    return found if not found or isinstance(found[0], tuple) else ((0.0, found),)


def parsed_lengths(value: Any, path: str, faults: list[str]) -> Any:
    """Numbers as a tuple, or pairs as tuples; arguments as of `parsed`."""
    if value is None or _are_numbers(value):
        return None if value is None else tuple(value)
    found = pairs(value, lambda own: _are_numbers(own) and len(own) > 0)
    if found is None:
        faults.append(f"{path}: got {value!r}, expected {EXPECTED_LENGTHS}")
        return ()
    return tuple((begin, tuple(own)) for begin, own in found)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(x) is int for x in value)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1
