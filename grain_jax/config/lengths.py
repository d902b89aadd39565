"""N, the patches of an image in its own shape: numbers, or others by the share of the run (docs/method.md)."""

from collections.abc import Sequence
from typing import Any

from grain_jax.config import keep

Lengths = tuple[int, ...] | tuple[tuple[float, tuple[int, ...]], ...]
EXPECTED = (
    "numbers of patches (N, ...), or pairs [[begin, [N, ...]], ...] by the share of the run, the first begin 0, such as"
    " [[0, [64]], [0.8, [64, 196]]]"
)


def stretches(lengths: Lengths | None) -> Sequence[tuple[float, tuple[int, ...]]]:
    """(Begin, numbers) of each stretch of a run; () of squares."""
    pairs: Any = lengths or ()
    return pairs if not pairs or isinstance(pairs[0], tuple) else ((0.0, pairs),)


def of_steps(lengths: Lengths | None, total_steps: int) -> list[tuple[int, tuple[int, ...]]]:
    """(The first step, the numbers from there on) for each stretch of a run that has steps; [] of squares."""
    return keep.of_steps(stretches(lengths), total_steps)


def parsed(value: Any, path: str, faults: list[str]) -> Any:
    """Numbers as a tuple, or pairs as tuples; arguments as of `keep.parsed`."""
    if value is None or _are_numbers(value):
        return None if value is None else tuple(value)
    pairs = keep.pairs(value, lambda own: _are_numbers(own) and len(own) > 0)
    if pairs is None:
        faults.append(f"{path}: got {value!r}, expected {EXPECTED}")
        return ()
    return tuple((begin, tuple(own)) for begin, own in pairs)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(x) is int for x in value)
