"""The results of a sweep: one row per run, sorted by a metric, as text, CSV and an image with the spread of the seeds."""

import csv
import dataclasses
import io
import math
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.core import atomic, errors
from grain_jax.evaluate import tables
from grain_jax.launch.sweep_runs import SweepRun
from grain_jax.runtime import metrics_file

SEED = "seed"
_HEADLINES = (
    "/top1",
    "/r1",
    "/box_iou",
    "/miou",
)  # endings of the keys that a table is sorted by unasked
# Metrics of training, beside the losses, that rank by their least value.
LOWER = ("grad_norm", "input_wait_fraction", "input_wait_steps", "texts_dropped", "texts_too_long")
_LAST = 5  # logged steps that a training metric is averaged over: a single batch is noisy
_MOST_LINES = 6  # of a panel that a legend still tells apart


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """A run and its metrics."""

    name: str
    swept: Mapping[str, Any]
    state: str  # "finished", "step 40 of 100" or "not started"
    step: int
    values: Mapping[str, float]


def _values(lines: Sequence[metrics_file.Line]) -> dict[str, float]:
    """A run's metrics: of its evaluations the last, of the others the mean over the last logged steps."""
    values = {key: of_steps[-1] for key, (_, of_steps) in metrics_file.series(lines).items()}
    for key, (_, of_steps) in metrics_file.series(lines[-_LAST:]).items():
        if not key.startswith("eval/"):
            values[key] = fmean(of_steps)
    return values  # the last value of a metric that the recent lines lack


def read(runs: Sequence[SweepRun], finished: Sequence[bool]) -> list[SweepRow]:
    """The rows of the runs of a sweep, in their order; `finished`: whether each is."""
    rows = []
    for run, is_finished in zip(runs, finished, strict=True):
        lines, faults = metrics_file.read(metrics_file.files(run.folder))
        for fault in faults:
            print(fault, file=sys.stderr)
        step, total = lines[-1].step if lines else 0, run.config.total_steps
        state = f"step {step}" + f" of {total}" * bool(total) if step else "not started"
        state = "finished" if is_finished else state
        rows.append(SweepRow(run.name, run.swept, state, step, _values(lines)))
    return rows


def default_metric(rows: Sequence[SweepRow]) -> str:
    """The first accuracy that was measured, else the loss."""
    keys = [key for row in rows for key in row.values]
    return next((k for k in keys if k.startswith("eval/") and k.endswith(_HEADLINES)), "loss")


def lower_is_better(metric: str, config: config_lib.Config) -> bool:
    """Whether a metric ranks by its least value: of evaluators those that they declare, and losses and LOWER."""
    if metric.startswith("eval/"):
        name, last = metric.split("/")[1], metric.rpartition("/")[2]
        return name in config.evals and last in config.evals[name].lower_is_better
    return metric.startswith("loss") or metric.partition("/")[0] in LOWER


def check(rows: Sequence[SweepRow], metric: str) -> None:
    """Raises UserError, with the nearest name, if there are metrics but not this one."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    if keys and metric not in keys:
        raise errors.UserError(f"--metric: {metric}: {config_lib.unknown_key(metric, keys)}")


def ranked(rows: Sequence[SweepRow], metric: str, lower: bool) -> list[SweepRow]:
    """Best first, which is the lowest or the highest; runs that are not finished after those that are."""
    sign = 1 if lower else -1
    value = lambda row: sign * row.values.get(metric, sign * math.inf)
    return sorted(rows, key=lambda row: (row.state != "finished", value(row)))


def _axes(rows: Sequence[SweepRow]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.swept))


def _labels(axes: Sequence[str]) -> list[str]:
    """The keys' last parts, where these differ."""
    leaves = [axis.rpartition(".")[2] for axis in axes]
    return [a if leaves.count(leaf) > 1 else leaf for a, leaf in zip(axes, leaves)]


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _counts(row: SweepRow, metric: str) -> bool:
    return row.state == "finished" and metric in row.values


def _title(axes: Sequence[str], values: Sequence[Any]) -> str:
    return ", ".join(f"{label}={_cell(value)}" for label, value in zip(_labels(axes), values))


def _over_seeds(rows: Sequence[SweepRow], metric: str, axes: Sequence[str]):
    """Values of these axes -> the metric of every seed, in the rows' order."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        key = tuple(row.swept.get(axis) for axis in axes)
        groups.setdefault(key, []).append(row.values[metric])
    return groups


def text(rows: Sequence[SweepRow], metric: str, lower: bool) -> str:
    """The table, best first, and below it the means over seeds where there are several."""
    axes = _axes(rows)
    shown = [metric] if metric == "loss" else [metric, "loss"]
    cells = [
        [
            row.name,
            *(_cell(row.swept[axis]) if axis in row.swept else "" for axis in axes),
            *(f"{row.values[key]:.4f}" if key in row.values else "" for key in shown),
            row.state,
        ]
        for row in ranked(rows, metric, lower)
    ]
    page = f"by {metric}, {'lower' if lower else 'higher'} is better\n"
    page += tables.table(["run", *_labels(axes), *shown, "state"], cells)
    others = [axis for axis in axes if axis != SEED]
    groups = _over_seeds([row for row in rows if _counts(row, metric)], metric, others)
    if SEED in axes and others and groups:
        header = ["over seeds", f"mean {metric}", "least", "most", "seeds"]
        best_first = sorted(groups.items(), key=lambda group: fmean(group[1]), reverse=not lower)
        means = [
            [_title(others, key), *(f"{of(x):.4f}" for of in (fmean, min, max)), str(len(x))]
            for key, x in best_first
        ]
        page += "\n\n" + tables.table(header, means)
    return page


def csv_text(rows: Sequence[SweepRow], metric: str, lower: bool) -> str:
    """The table with every metric that the runs have, the sorting one first."""
    axes = _axes(rows)
    keys = dict.fromkeys([metric, *(key for row in rows for key in row.values)])
    page = io.StringIO()
    writer = csv.writer(page, lineterminator="\n")
    writer.writerow(["run", "state", "step", *axes, *keys])
    for row in ranked(rows, metric, lower):
        swept = (row.swept.get(axis, "") for axis in axes)
        values = (row.values.get(key, "") for key in keys)
        writer.writerow([row.name, row.state, row.step, *swept, *values])
    return page.getvalue()


def draw(rows: Sequence[SweepRow], metric: str, lower: bool, path: epath.Path) -> bool:
    """Draws the metric against each swept axis: a dot per run, and a line through the means over seeds with their range.

    Returns:
      Whether there was a finished run to draw.
    """
    import matplotlib  # half a second to import
    from matplotlib.figure import Figure

    done = [row for row in rows if _counts(row, metric)]
    if not done:
        return False
    axes = [axis for axis in _axes(rows) if axis != SEED] or [SEED]
    better = "lower" if lower else "higher"
    page = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}):  # values are texts, not formulas
        figure = Figure(figsize=(1 + 5 * len(axes), 4.2), layout="constrained", dpi=110)
        for panel, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes):
            _panel(panel, done, metric, axis, [other for other in axes if other != axis])
        figure.axes[0].set_ylabel(metric)
        figure.suptitle(
            f"{len(done)} of {len(rows)} runs; {better} is better\n"
            "a dot a run; lines and bars: mean and range over seeds",
            fontsize=9,
        )
        figure.savefig(page, format="png")
    atomic.write_bytes(path, page.getvalue())
    return True


def _panel(panel, rows: Sequence[SweepRow], metric: str, axis: str, others: Sequence[str]) -> None:
    rows = [row for row in rows if axis in row.swept]
    values = list(dict.fromkeys(row.swept[axis] for row in rows))
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if numbers:
        values.sort()
    at = {value: value if numbers else i for i, value in enumerate(values)}
    lines: dict[tuple[Any, ...], dict[Any, list[float]]] = {}
    for (value, *key), seeds in _over_seeds(rows, metric, [axis, *others]).items():
        lines.setdefault(tuple(key), {})[value] = seeds
    for number, (key, points) in enumerate(lines.items()):
        colour = f"C{number % 10}"
        where = [value for value in values if value in points]
        mean = [fmean(points[v]) for v in where]
        below = [m - min(points[v]) for m, v in zip(mean, where)]
        above = [max(points[v]) - m for m, v in zip(mean, where)]
        style = dict(color=colour, capsize=4, marker="_", label=_title(others, key))
        panel.errorbar([at[v] for v in where], mean, [below, above], **style)
        dots = [(at[v], y) for v in where for y in points[v]]
        panel.scatter(*zip(*dots), color=colour, s=26, edgecolors="white", zorder=3)
    if numbers and min(values) > 0 and max(values) >= 4 * min(values):
        panel.set_xscale("log")
    if not numbers or len(values) <= 8:
        panel.set_xticks([at[v] for v in values], [_cell(v) for v in values])
        panel.minorticks_off()
    panel.set_xlabel(axis)
    panel.grid(alpha=0.3)
    if others and len(lines) <= _MOST_LINES:
        panel.legend(fontsize=8, framealpha=0.6)


def summary(run: SweepRun, metric: str | None) -> str:
    """A finished run's metric, in a few words; nothing where it was not measured."""
    lines, _ = metrics_file.read(metrics_file.files(run.folder))
    row = SweepRow(run.name, {}, "finished", 0, _values(lines))
    metric = metric or default_metric([row])
    return f"{metric} {row.values[metric]:.4f}" if metric in row.values else ""
