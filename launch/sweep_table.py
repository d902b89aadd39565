"""The results of a sweep: a row per run, best first, and the means over seeds; as text and as CSV."""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from grain_jax import config as config_lib
from grain_jax.core import metrics_file, named
from grain_jax.evaluate import kinds, tables
from grain_jax.launch.sweep_runs import SweepRun, finished, labels, short

SEED = "seed"
_HEADLINES = ("/top1", "/r1", "/box_iou", "/miou")  # endings of the keys that rank unasked
# Metrics of training, beside the losses, that rank by their least value.
LOWER = ("grad_norm", "input_wait_fraction", "texts_dropped", "texts_too_long")
_LAST = 5  # logged steps that a training metric is averaged over: a single batch is noisy


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """A run and its metrics."""

    run: SweepRun
    state: str  # "finished", "step 40 of 100" or "not started"
    step: int
    values: Mapping[str, float]


def _values(lines: Sequence[metrics_file.Line]) -> dict[str, float]:
    """A run's metrics: the last value of evaluations, the mean over the last logged steps of all others."""
    values = {key: of_steps[-1] for key, (_, of_steps) in metrics_file.series(lines).items()}
    for key, (_, of_steps) in metrics_file.series(lines[-_LAST:]).items():
        if not key.startswith("eval/"):
            values[key] = fmean(of_steps)
    return values  # the last value of a metric that the recent lines lack


def read(runs: Sequence[SweepRun]) -> list[SweepRow]:
    """The rows of the runs of a sweep, in their order."""
    rows = []
    for run in runs:
        lines = metrics_file.read(run.folder)
        step, total = lines[-1].step if lines else 0, run.config.total_steps
        state = f"step {step}" + f" of {total}" * bool(total) if step else "not started"
        state = "finished" if finished(run) else state
        rows.append(SweepRow(run, state, step, _values(lines)))
    return rows


def default_metric(rows: Sequence[SweepRow]) -> str:
    """The first accuracy that was measured, else the loss."""
    keys = [key for row in rows for key in row.values]
    return next((k for k in keys if k.startswith("eval/") and k.endswith(_HEADLINES)), "loss")


def lower_is_better(metric: str, config: config_lib.Config) -> bool:
    """Whether a metric ranks by its least value: losses, LOWER, and what an evaluator declares."""
    if metric.startswith("eval/"):
        name, last = metric.split("/")[1], metric.rpartition("/")[2]
        if name not in config.evals:
            return False
        with named.importing():
            return last in kinds.find(config.evals[name]["kind"]).lower_is_better
    return metric.startswith("loss") or metric.partition("/")[0] in LOWER


def ranked(rows: Sequence[SweepRow], metric: str, lower: bool) -> list[SweepRow]:
    """The finished runs, best first, then the others."""
    sign = 1 if lower else -1
    value = lambda row: sign * row.values.get(metric, sign * math.inf)
    return sorted(rows, key=lambda row: (row.state != "finished", value(row)))


def text(rows: Sequence[SweepRow], metric: str, lower: bool) -> str:
    """The table, best first, and below it the means over several seeds."""
    axes = list(dict.fromkeys(key for row in rows for key in row.run.swept))
    label = labels(axes)
    shown = [metric] if metric == "loss" else [metric, "loss"]
    cells = [
        [
            row.run.name,
            *(short(row.run.swept[axis]) if axis in row.run.swept else "" for axis in axes),
            *(f"{row.values[key]:.4f}" if key in row.values else "" for key in shown),
            row.state,
        ]
        for row in ranked(rows, metric, lower)
    ]
    page = f"by {metric}, {'lower' if lower else 'higher'} is better\n"
    page += tables.table(["run", *label.values(), *shown, "state"], cells)
    groups: dict[str, list[float]] = {}  # all that differs but the seed -> the metric of each seed
    for row in rows:
        if row.state == "finished" and metric in row.values:
            others = [f"{label[k]}={short(v)}" for k, v in row.run.swept.items() if k != SEED]
            groups.setdefault(", ".join(others), []).append(row.values[metric])
    if SEED in axes and len(axes) > 1 and groups:
        means = [
            [title, *(f"{statistic(x):.4f}" for statistic in (fmean, min, max)), str(len(x))]
            for title, x in sorted(groups.items(), key=lambda g: fmean(g[1]), reverse=not lower)
        ]
        header = ["over seeds", f"mean {metric}", "least", "most", "seeds"]
        page += "\n\n" + tables.table(header, means)
    return page


def csv_text(rows: Sequence[SweepRow], metric: str, lower: bool) -> str:
    """The table with every metric that the runs have, the sorting one first."""
    axes = list(dict.fromkeys(key for row in rows for key in row.run.swept))
    keys = dict.fromkeys([metric, *(key for row in rows for key in row.values)])
    page = io.StringIO()
    header = ["run", "state", "step", *axes, *keys]
    writer = csv.DictWriter(page, header, restval="", lineterminator="\n")
    writer.writeheader()
    for row in ranked(rows, metric, lower):
        cells = {"run": row.run.name, "state": row.state, "step": row.step}
        writer.writerow(cells | {**row.run.swept, **row.values})
    return page.getvalue()
