"""The table of the comparison: python -m examples.claim.table WORKDIR, the --workdir of the sweep.

Each arm has the learning rate that validation prefers on the first seed. With that rate, the table has top-1
of unseen classes by description at alpha 1 in %, per seed and as a mean. It also has the lead of OURS over
the arm in the same seed, and means of other measures. Intervals are 95%, by Student's t over the seeds.
"""

import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import scipy.stats

from examples.claim.config import ARMS, RATES, SEEDS, WAYS, Run, runs
from grain_jax.launch import sweep_runs

OURS = "grain_pooled"  # its lead over every other arm is shown
Row = Mapping[str, float]  # key of results.json without "eval/" -> number
REGIONS = ("unseen_test/alpha_0.5", "grounding/", "detection/")  # CLIP's arms train nothing for these
COLUMNS = {  # heading -> key, factor
    "seen by name": ("seen_test/alpha_1.0/top1", 100),
    "unseen, alpha .5": ("unseen_test/alpha_0.5/top1", 100),
    "in groups": ("groups/image_to_text", 100),
    "R@1 to text": ("retrieval/image_to_text/r1", 100),
    "to image": ("retrieval/text_to_image/r1", 100),
    "IoU": ("grounding/box_iou", 1),
    "phrases": ("grounding/phrase_acc50", 100),
    "of another image": ("grounding/phrase_acc50_other_image", 100),
    "AP50": ("detection/ap50", 100),
    "region R@1": ("grounding/region_to_description_r1", 100),
}


def read(run: pathlib.Path) -> Row:
    """The results of a run that was evaluated at its end; else nothing."""
    file = run / "results.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    return {key.removeprefix("eval/"): value for key, value in stored.items()}


def means(rows: Sequence[Row], columns: Mapping[str, tuple[str, float]] = COLUMNS) -> list[str]:
    """A cell for each of the columns: the mean over the rows that have it."""
    values = [[factor * row[key] for row in rows if key in row] for key, factor in columns.values()]
    return [f"{fmean(each):.3g}" if each else "" for each in values]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of texts, without the columns that no line fills."""
    filled = [column for column in zip(header, *lines) if any(column[1:]) or not lines]
    header, *lines = zip(*filled)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def by_description(row: Row, split: str) -> float:
    """Top-1 of unseen classes at alpha 1, asked in the way that suits the validation classes best."""
    way = max(WAYS, key=lambda way: row[f"{way}_validation/alpha_1.0/top1"])
    return row[f"{way}_{split}/alpha_1.0/top1"]


def validation(arm: str, row: Row) -> float:
    """What chooses the rate: seen names for CLIP on web captions, which never reads a description."""
    return row["seen_validation/alpha_1.0/top1"] if arm == "clip" else by_description(row, "validation")


def interval(values: Sequence[float], sign: str = "") -> str:
    """The mean with its 95% interval, by Student's t; of one value without."""
    mean = fmean(values)
    if len(values) < 2:
        return f"{mean:{sign}.1f}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{mean:{sign}.1f} ({mean - half:{sign}.1f} to {mean + half:{sign}.1f})"


def table(results: Mapping[Run, Row]) -> str:
    """The table of the finished runs; an arm has a line when all its rates have run on the first seed."""
    chosen, unseen, lines = {}, {}, []
    for arm in ARMS:
        if all((arm, rate, SEEDS[0]) in results for rate in RATES):
            rate = max(RATES, key=lambda rate: validation(arm, results[arm, rate, SEEDS[0]]))
            rows = {seed: results[arm, rate, seed] for seed in SEEDS if (arm, rate, seed) in results}
            chosen[arm] = rate, [*rows.values()]
            unseen[arm] = {seed: 100 * by_description(row, "test") for seed, row in rows.items()}
    for arm, (rate, rows) in chosen.items():
        values, ours = unseen[arm], unseen.get(OURS, {})
        leads = [ours[seed] - value for seed, value in values.items() if arm != OURS and seed in ours]
        if arm.startswith("clip"):
            rows = [{key: x for key, x in row.items() if not key.startswith(REGIONS)} for row in rows]
        cells = [ARMS[arm][0], f"{rate:g}", ", ".join(f"{x:.1f}" for x in values.values())]
        cells += [interval([*values.values()]), interval(leads, "+") if leads else "", *means(rows)]
        lines.append(cells)
    lead = f"lead of {ARMS[OURS][0]} (95%)"
    return markdown(["arm", "rate", "unseen, alpha 1: seeds", "mean (95%)", lead, *COLUMNS], lines)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m examples.claim.table WORKDIR, the folder of the sweep")
    every, workdir = runs(), pathlib.Path(sys.argv[1])
    names = sweep_runs.name_points(list(every.values()))
    finished = {run: row for run, name in zip(every, names) if (row := read(workdir / name))}
    print(f"{len(finished)} of {len(every)} runs are finished.\n\n{table(finished)}")
