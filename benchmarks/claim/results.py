"""Tables of results: tab-separated, one row a run, which a run appends when it has finished."""

import csv
import fcntl
import io
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.claim import design
from grain_jax import errors

Result = Mapping[str, Any]  # column -> value; without the columns that the arm does not measure


class ClaimError(errors.UserError):
    """Unusable input; the message is one line."""


# The numbers of the final evaluation that the plan, the report and docs/claim.md use: names of metrics.jsonl.
MEASURED = (
    "seen_validation/alpha_1.0/top1",
    "unseen_validation/alpha_1.0/top1",
    "unseen_validation/alpha_0.5/top1",
    "unit_validation/alpha_1.0/top1",
    "sentence_validation/alpha_1.0/top1",
    "seen_test/alpha_1.0/top1",
    "seen_test/chance",
    *(f"unseen_test/alpha_{alpha}/top1" for alpha in design.ALPHAS),
    "unseen_test/chance",
    "unit_test/alpha_1.0/top1",
    "sentence_test/alpha_1.0/top1",
    *(
        f"retrieval/{way}/{key}"
        for way in ("image_to_text", "text_to_image")
        for key in ("r1", "chance_r1")
    ),
    *(
        f"grounding_{group}/{chance}{key}"
        for group, keys in (
            ("seen", ("region_to_description_r1",)),
            ("unseen", ("box_iou", "box_acc50", "region_to_description_r1", "phrase_acc50")),
        )
        for key in keys
        for chance in ("", "chance_")
    ),
)
# Means over the last five lines of metrics.jsonl.
TRAINED = (
    "loss_image_caption",
    "loss_region_description",
    "loss_image_description",
    "loss_box",
    "matched_iou",
    "logit_scale",
)
COLUMNS: dict[str, type] = {
    "design": int,
    "data": str,
    "arm": str,
    "rate": float,
    "steps": int,
    "seed": int,
    "settings": str,  # fingerprint, see `design.settings_of`
    "batch_size": int,
    "device": str,
    "jax": str,
    "seconds": float,
    "images_per_second": float,
    "flops_per_step": float,
    **dict.fromkeys((*TRAINED, *MEASURED), float),
}


def run_of(result: Result) -> design.Run:
    """The run of this row."""
    return design.Run(*(result[field] for field in design.Run._fields))


def read(path: pathlib.Path) -> dict[str, Result]:
    """Name -> result of every finished run of this design; empty where there is no file yet.

    Raises:
      ClaimError: see `rows`.
    """
    found = rows(path, COLUMNS)
    return {run_of(row).name: row for row in found if row["design"] == design.DESIGN}


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
    """Appends a row atomically; several processes may append at the same time.

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
        writer = csv.DictWriter(out, columns, delimiter="\t", lineterminator="\n")
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
