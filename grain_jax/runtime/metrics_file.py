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
_LARGEST_STEP = 2**31 - 1  # as config.total_steps


class Line(NamedTuple):
    """One logged step.

    Attributes:
      step: its number.
      values: the object, `step` included.
      text: the line of the file.
    """

    step: int
    values: dict[str, Any]
    text: str


def files(workdir: epath.PathLike) -> list[epath.Path]:
    """`metrics.jsonl` of a workdir, as a list; [] where there is none."""
    path = epath.Path(workdir) / FILE
    return [path] if path.exists() else []


def read(paths: Iterable[epath.Path]) -> tuple[list[Line], list[str]]:
    """The valid lines of the files, and a fault for each file with invalid ones."""
    lines: list[Line] = []
    faults = []
    for path in paths:
        try:
            content = regular_file.read(path, _LONGEST, "a file of metrics")
        except regular_file.FileError as error:
            faults.append(str(error))
            continue
        texts = content.decode(errors="replace").split("\n")
        cut_off = texts.pop()  # "" where the last line has its end
        parsed = [(number, text, _parse(text)) for number, text in enumerate(texts, 1) if text]
        if last := _parse(cut_off):
            parsed.append((len(texts) + 1, cut_off, last))
        lines += [line for _, _, line in parsed if line]
        bad = [(number, text) for number, text, line in parsed if line is None]
        if bad:
            number, text = bad[0]
            faults.append(
                f"{path}, line {number}: got {text[:40]!r}, expected a JSON object with a whole number step;"
                f" {len(bad)} of {len(parsed)} lines do not count"
            )
    return lines, faults


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
    if type(step) is not int or not 0 <= step <= _LARGEST_STEP:
        return None
    return Line(step, values, text)
