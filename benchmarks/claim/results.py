"""Tables of results: tab-separated, one row a run, which a run appends when it has finished."""

import csv
import fcntl
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.claim import design
from grain_jax.core import errors

Result = Mapping[str, Any]  # column -> value; without the columns that the arm does not measure


class ClaimError(errors.UserError):
    """Unusable input; the message is one line."""


def columns_of(table: pathlib.Path) -> dict[str, type]:
    """Column -> type of its cells, of a table in this package."""
    with table.open() as file:
        names = file.readline().rstrip("\n").split("\t")
    return {name: next((t for t, of in _TYPES.items() if name in of), float) for name in names}


TABLES = pathlib.Path(__file__).parent / "tables"
_TYPES = {
    int: ("design", "steps", "seed", "batch_size"),
    str: ("data", "arm", "settings", "device", "jax"),  # settings: see `design.settings_of`
}
COLUMNS = columns_of(TABLES / "claim.tsv")
# Of the final evaluation: names of metrics.jsonl. What the plan, the report and docs/claim.md use.
MEASURED = [name for name in COLUMNS if "/" in name]
# Means over the last five lines of metrics.jsonl, of every table.
_COLUMNS = [*COLUMNS, *columns_of(TABLES / "dense.tsv"), *columns_of(TABLES / "words.tsv")]
TRAINED = [name for name in dict.fromkeys(_COLUMNS) if name.startswith("loss_")]
TRAINED += ["matched_iou", "logit_scale"]


def run_of(result: Result) -> design.ClaimRun:
    """The run of this row."""
    return design.ClaimRun(*(result[field] for field in design.ClaimRun._fields))


def read(path: pathlib.Path) -> dict[str, Result]:
    """Name -> result of every finished run of this design; empty where there is no file yet.

    Raises:
      ClaimError: see `rows`.
    """
    found = rows(path, COLUMNS)
    return {run_of(row).name: row for row in found if row["design"] == design.DESIGN}


def checked(
    path: pathlib.Path,
    columns: Mapping[str, type],
    settings_of: Callable[[design.ClaimRun], str],
    module: str,
) -> dict[str, Result]:
    """Name -> row of every finished run of a table of one design.

    Raises:
      ClaimError: see `rows`; or a row has other settings than that file of benchmarks/claim.
    """
    found = {run_of(row).name: row for row in rows(path, columns)}
    for name, row in found.items():
        if settings_of(run_of(row)) != row["settings"]:
            raise ClaimError(
                f"{path}: {name}: got a result of other settings than benchmarks/claim/{module}, expected the same;"
                " delete its row, or give another --results"
            )
    return found


def rows(path: pathlib.Path, columns: Mapping[str, type]) -> list[Result]:
    """The rows of a table. A last line without a line break is skipped: its run was killed while writing it.

    Raises:
      ClaimError: the table has other columns, or a cell does not have the type of its column.
    """
    if not path.exists():
        return []
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    _check_header(path, lines[:1], columns)
    found = []
    for number, row in enumerate(csv.DictReader(lines, delimiter="\t"), start=2):
        try:
            found.append({key: columns[key](cell) for key, cell in row.items() if cell})
        except (KeyError, ValueError) as error:
            raise ClaimError(f"{path}, line {number}: not a result ({error!r})") from None
    return found


def append(path: pathlib.Path, result: Result, columns: Iterable[str] = COLUMNS) -> None:
    """Appends those of the row's `columns` atomically; several processes may append at the same time.

    Raises:
      ClaimError: the table has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        whole = text.rfind("\n") + 1
        file.truncate(len(text[:whole].encode()))  # an incomplete line of a killed run
        _check_header(path, text[:whole].splitlines()[:1], columns)
        out = io.StringIO()
        form = dict(delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer = csv.DictWriter(out, columns, **form)
        if not whole:
            writer.writeheader()
        writer.writerow(result)
        file.write(out.getvalue())
        file.flush()
        os.fsync(file.fileno())


def _check_header(path: pathlib.Path, first_line: list[str], columns: Iterable[str]) -> None:
    if first_line and first_line[0].split("\t") != list(columns):
        raise ClaimError(
            f"{path}: has other columns than this study writes; move it away, or give another --results"
        )
