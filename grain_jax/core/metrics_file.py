"""Reads `metrics.jsonl`.

A line is a JSON object with a whole number `step`. A killed process leaves an incomplete last line. Other
lines are counted on stderr and left out.
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


def read(workdir: epath.PathLike) -> list[Line]:
    """The valid lines of the file of a workdir; [] without a file. Raises regular_file.FileError."""
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return []
    content = regular_file.read(path, _LONGEST, "a file of metrics")
    *texts, cut_off = content.decode(errors="replace").split("\n")
    lines = [_parse(text) for text in texts if text]
    if wrong := lines.count(None):
        expected = "expected JSON objects with a whole number step"
        print(f"{path}: {wrong} of {len(lines)} lines left out, {expected}", file=sys.stderr)
    return [line for line in (*lines, _parse(cut_off)) if line]


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
