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

from examples.claim import config
from examples.claim.sweep import ARMS, RATES, SEEDS, Run, runs
from grain_jax.launch import sweep_runs

OURS = "grain_pooled"  # its lead over every other arm is shown
Results = Mapping[Run, Mapping[str, float]]  # of the finished runs
# Heading -> key of results.json, factor, digits, and whether the arm has to train region losses.
COLUMNS = {
    "seen by name": ("seen_test/alpha_1.0/top1", 100, 1, False),
    "unseen, alpha .5": ("unseen_test/alpha_0.5/top1", 100, 1, True),
    "R@1 to text": ("retrieval/image_to_text/r1", 100, 1, False),
    "to image": ("retrieval/text_to_image/r1", 100, 1, False),
    "IoU": ("grounding/box_iou", 1, 3, True),
    "region R@1": ("grounding/region_to_description_r1", 100, 1, True),
}


def read(workdir: pathlib.Path) -> Results:
    """The results of the runs that have been evaluated at their end."""
    every = list(runs())
    results = {}
    for run, name in zip(every, sweep_runs.name_points([run.point for run in every]), strict=True):
        file = workdir / name / "results.json"
        if file.exists():
            stored = json.loads(file.read_text())
            results[run] = {key.removeprefix("eval/"): value for key, value in stored.items()}
    return results


def by_description(row: Mapping[str, float], split: str) -> float:
    """Top-1 of unseen classes at alpha 1, asked in the way that suits the validation classes best."""
    way = max(config.WAYS, key=lambda way: row[f"{way}_validation/alpha_1.0/top1"])
    return row[f"{way}_{split}/alpha_1.0/top1"]


def best_rate(results: Results, arm: str) -> float | None:
    """The learning rate of an arm with the best validation score on the first seed; None before all have run.

    CLIP on web captions, which never reads a description, is chosen by seen names.
    """
    tried = [Run(arm, rate, SEEDS[0]) for rate in RATES]
    if not all(run in results for run in tried):
        return None
    by_name = lambda row: row["seen_validation/alpha_1.0/top1"]
    score = by_name if arm == "clip" else lambda row: by_description(row, "validation")
    return max(tried, key=lambda run: score(results[run])).rate


def interval(values: Sequence[float], sign: str = "") -> str:
    """The mean with its 95% interval, by Student's t; of one value without."""
    mean = fmean(values)
    if len(values) < 2:
        return f"{mean:{sign}.1f}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{mean:{sign}.1f} ({mean - half:{sign}.1f} to {mean + half:{sign}.1f})"


def table(results: Results) -> str:
    """The table, as Markdown; arms whose learning rate is not chosen yet are left out."""
    chosen = {}
    for arm in ARMS:
        rate = best_rate(results, arm)
        if rate is not None:
            of_seed = {seed: results.get(Run(arm, rate, seed)) for seed in SEEDS}
            chosen[arm] = rate, {seed: row for seed, row in of_seed.items() if row}
    unseen = {
        arm: {seed: 100 * by_description(row, "test") for seed, row in rows.items()}
        for arm, (_, rows) in chosen.items()
    }
    lines = []
    for arm, (rate, rows) in chosen.items():
        values = list(unseen[arm].values())
        cells = [ARMS[arm].label, f"{rate:g}", ", ".join(f"{x:.1f}" for x in values)]
        cells += [interval(values), lead(unseen, arm)]
        for key, factor, digits, regions in COLUMNS.values():
            measured = [factor * row[key] for row in rows.values() if key in row]
            show = measured and (ARMS[arm].regions or not regions)
            cells.append(f"{fmean(measured):.{digits}f}" if show else "")
        lines.append(cells)
    header = ["arm", "rate", "unseen, alpha 1: seeds", "mean (95%)"]
    header += [f"lead of {ARMS[OURS].label} (95%)", *COLUMNS]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def lead(unseen: Mapping[str, Mapping[int, float]], arm: str) -> str:
    """By how much OURS leads an arm, of the seeds that both have."""
    ours = unseen.get(OURS, {})
    points = [ours[seed] - value for seed, value in unseen[arm].items() if seed in ours]
    return interval(points, "+") if points and arm != OURS else ""


def main() -> int:
    """Prints the table; returns the exit status."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m examples.claim.table WORKDIR", file=sys.stderr)
        return 0 if "--help" in sys.argv[1:] else 2
    results = read(pathlib.Path(sys.argv[1]))
    print(f"{len(results)} of {len(list(runs()))} runs are finished.\n\n{table(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
