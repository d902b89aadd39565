"""The weight of a loss term: a number, or a function of the step (docs/method.md, Losses)."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

KEYS = ("start", "end", "from", "to")
EXPECTED = 'a finite number, or {"start": 0, "end": 1, "from": 0.8, "to": 0.8} with shares of the run, 0 to 1'


class Schedule(dict[str, float]):
    """A weight that is `start` before the share `from` of a run, linear from there to `to`, and `end` from `to` on.

    The share of a step is step / steps of the run: 0 of the first step, 1 - 1 / steps of the last one. Shares are
    compared as decimal fractions, not as floats, so that 0.07 of 100 steps is step 7. It is False where it is 0 in
    every step, as a number is.
    """

    def __bool__(self) -> bool:
        return bool(self["start"] or self["end"])

    def __str__(self) -> str:
        return f"{{{', '.join(f'{key}: {self[key]:g}' for key in KEYS)}}}"

    def __format__(self, spec: str) -> str:
        del spec  # of a number
        return str(self)

    def changes(self, total_steps: int) -> tuple[int, int]:
        """The first steps whose shares are at least `from` and at least `to`."""
        begin, until = (first_step(self[key], total_steps) for key in ("from", "to"))
        return begin, until

    def on(self, total_steps: int) -> range:
        """The steps in which it is not 0; those of a line through 0 count whole."""
        first, last = 0, total_steps
        begin, until = self.changes(total_steps)
        if not self["start"]:
            first = begin
            if self["from"] < self["to"]:  # at `from` it is still 0
                first = min(math.floor(_exact(self["from"]) * total_steps) + 1, until)
        if not self["end"]:
            last = until
        return range(first, min(last, total_steps)) if self else range(0)


Weight = float | Schedule


def first_step(share: float, total_steps: int) -> int:
    """The first step whose share of the run is at least this one; shares are compared as decimal fractions."""
    return math.ceil(_exact(share) * total_steps)


def _exact(share: float) -> Fraction:
    return Fraction(repr(share))


def last(weight: Any) -> float:
    """The weight at the end of a run, of a number or of a stored schedule."""
    return float(weight.get("end", 0.0) if isinstance(weight, Mapping) else weight)


def parsed(value: Any, path: str, unknown: Any, faults: list[str]) -> Any:
    """A weight as a float or a Schedule with all keys.

    `start`, `end` and `from` are 0 where they are not given, `to` is `from`; one of `from` and `to` is given.

    Args:
      value: a number, or a mapping.
      path: its key, for the faults.
      unknown: makes the words for a key that does not exist (`parse.unknown_key`).
      faults: gets a line for each fault; the value may then not be used.
    """
    if _is_finite(value):
        return float(value)
    if not isinstance(value, Mapping):
        faults.append(f"{path}: got {value!r}, expected {EXPECTED}")
        return value
    before = len(faults)
    for key in value:
        place = f"{path}.{key}"
        if key not in KEYS:
            faults.append(f"{place}: {unknown(place, [f'{path}.{known}' for known in KEYS])}")
        elif not _is_finite(value[key]):
            faults.append(f"{place}: got {value[key]!r}, expected a finite number")
    if len(faults) > before:
        return value
    if "from" not in value and "to" not in value:
        faults.append(
            f"{path}: got {dict(value)}, expected from or to: the shares of the run where the weight changes"
        )
        return value
    begin = float(value.get("from", 0.0))
    given = {key: float(value.get(key, 0.0)) for key in ("start", "end")}
    schedule = Schedule(given | {"from": begin, "to": float(value.get("to", begin))})
    if not 0 <= schedule["from"] <= schedule["to"] <= 1:
        faults.append(
            f"{path}.from, {path}.to: got {schedule['from']:g}, {schedule['to']:g}, expected 0 <= from <= to <= 1,"
            " shares of the run"
        )
    return schedule


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300
