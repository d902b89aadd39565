"""Reads `metrics.jsonl`.

A line is a JSON object with a whole number `step`. A killed process leaves an incomplete last line, which is no
fault. Every other line is a fault: it is counted, reported and left out.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from grain_jax.core import regular_file

FILE = "metrics.jsonl"
_LONGEST = 4 << 30  # bytes of a file


class Line(NamedTuple):
    """One logged step."""

    step: int
    values: dict[str, Any]  # the object, `step` included
    text: str  # the line of the file


def read(workdir: epath.PathLike) -> tuple[list[Line], list[str]]:
    """The valid lines of the file of a workdir, and a fault if there are others; [], [] without a file."""
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return [], []
    try:
        content = regular_file.read(path, _LONGEST, "a file of metrics")
    except regular_file.FileError as error:
        return [], [str(error)]
    *texts, cut_off = content.decode(errors="replace").split("\n")
    parsed = [(number, text, _parse(text)) for number, text in enumerate(texts, 1) if text]
    if last := _parse(cut_off):
        parsed.append((len(texts) + 1, cut_off, last))
    faults = [
        f"{path}, line {number}: got {text[:40]!r}, expected a JSON object with a whole number step"
        for number, text, line in parsed
        if line is None
    ]
    if faults:
        faults = [f"{faults[0]}; {len(faults)} of {len(parsed)} lines do not count"]
    return [line for _, _, line in parsed if line], faults


def series(lines: Iterable[Line]) -> dict[str, tuple[list[float], list[float]]]:
    """key -> (steps, values) of all numbers that are finite."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for key, value in numbers(line):
            steps, values = found.setdefault(key, ([], []))
            steps.append(line.step)
            values.append(value)
    return found


def numbers(line: Line) -> Iterator[tuple[str, float]]:
    """(key, value) of the finite numbers of a line, without its step."""
    for key, value in line.values.items():
        if key != "step" and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
            yield key, float(value)


def _parse(text: str) -> Line | None:
    try:
        values = json.loads(text)
    except ValueError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    if type(step) is not int or step < 0:
        return None
    return Line(step, values, text)
