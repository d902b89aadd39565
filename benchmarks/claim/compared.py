"""Tables that designs 4 to 6 share: costs, measures, leads by seed, and bars; rows are grouped by arm."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import scipy.stats

from benchmarks.claim import design
from benchmarks.claim.measures import spread
from benchmarks.claim.report import table
from benchmarks.claim.results import Result

TIE = 1e-6  # points; less is rounding

Groups = Mapping[str, Sequence[Result]]  # arm -> its rows
Label = Callable[[str], str]  # an arm in words


class Measure(NamedTuple):
    """A column of the tables."""

    title: str
    of: Callable[[Result], float | None]
    scale: float = 100
    digits: int = 1


class Bar(NamedTuple):
    """What was asked of an arm."""

    wanted: str
    got: str
    met: bool


def column(name: str) -> Callable[[Result], float | None]:
    """Reads that column."""
    return lambda row: row.get(name)


def grouped(
    runs: Iterable[design.ClaimRun],
    found: Mapping[str, Result],
    key: Callable[[design.ClaimRun], str] = lambda run: run.arm,
) -> dict[str, list[Result]]:
    """The rows of finished runs, by arm or another key, in the order of the runs."""
    groups: dict[str, list[Result]] = {}
    for run in runs:
        if run.name in found:
            groups.setdefault(key(run), []).append(found[run.name])
    return groups


def values(rows: Sequence[Result], measure: Measure) -> dict[int, float]:
    """Seed -> value, of the rows that have the measure."""
    found = {row["seed"]: measure.of(row) for row in rows}
    return {seed: measure.scale * value for seed, value in found.items() if value is not None}


def leads(ours: Sequence[Result], theirs: Sequence[Result], measure: Measure) -> list[float]:
    """By how much `ours` are above `theirs`, of each seed that both have."""
    a, b = values(ours, measure), values(theirs, measure)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def _said(points: Sequence[float], digits: int) -> str:
    """The mean lead with its 95% interval, by Student's t over seeds."""
    mean = f"{fmean(points):+.{digits}f}"
    if len(points) < 2:
        return mean
    half = scipy.stats.t.ppf(0.975, len(points) - 1) * stdev(points) / math.sqrt(len(points))
    return f"{mean} ({fmean(points) - half:+.{digits}f} to {fmean(points) + half:+.{digits}f})"


def print_costs(arms: Groups, label: Label) -> None:
    """Prints seeds, steps, FLOPs, time and L_ic."""
    rows = []
    for arm, of_arm in arms.items():
        cells = [str(len(of_arm)), str(of_arm[0]["steps"])]
        cells += [spread([row["flops_per_step"] for row in of_arm[:1]], 1e-9)]
        cells += [spread([row["seconds"] for row in of_arm], 1 / 60)]
        cells += [spread([row["loss_image_caption"] for row in of_arm], 1, 2)]
        rows.append([label(arm), *cells])
    print(table(["arm", "seeds", "steps", "GFLOP a step", "minutes", "L_ic"], rows) + "\n")


def print_measures(
    arms: Groups, label: Label, measures: Mapping[str, Measure], asked: Sequence[str]
) -> None:
    """Prints means and deviations; and the seeds of the measures `asked`."""
    shown = {k: m for k, m in measures.items() if any(values(rows, m) for rows in arms.values())}
    rows = []
    for arm, of_arm in arms.items():
        found = [(list(values(of_arm, m).values()), m) for m in shown.values()]
        rows.append([label(arm), *(spread(v, 1, m.digits) if v else "" for v, m in found)])
    print(table(["arm", *(m.title for m in shown.values())], rows) + "\n")
    by_seed = [shown[key] for key in asked if key in shown]
    rows = []
    for arm, of_arm in arms.items():
        each = [(values(of_arm, measure), measure.digits) for measure in by_seed]
        cells = (", ".join(f"{v[seed]:.{d}f}" for seed in sorted(v)) for v, d in each)
        rows.append([label(arm), *cells])
    print(table(["by seed", *(m.title for m in by_seed)], rows) + "\n")


def print_leads(
    arms: Groups,
    label: Label,
    measures: Mapping[str, Measure],
    control_of: Callable[[str], str],
    title: str = "lead over the recipe alone",
) -> None:
    """Prints the leads of each arm over its control, where both have rows."""
    rows = []
    for arm, of_arm in arms.items():
        control = control_of(arm)
        if arm != control and control in arms:
            found = [(leads(of_arm, arms[control], m), m) for m in measures.values()]
            rows.append([label(arm), *(_said(v, m.digits) if v else "" for v, m in found)])
    if rows:
        header = [f"{title}, 95% interval", *(m.title for m in measures.values())]
        print(table(header, rows) + "\n")


def print_bars(bars: Mapping[str, Sequence[Bar]], label: Label) -> None:
    """Prints the bars of each arm, with the numbers, and whether they are met."""
    rows = [
        [label(arm), bar.wanted, bar.got, "MET" if bar.met else "NOT MET"]
        for arm, of_arm in bars.items()
        for bar in of_arm
    ]
    if rows:
        print(table(["arm", "bar", "got", ""], rows) + "\n")
