"""Tables of the fourth design: every arm of every study, what chose the pair, leads over the control, and the bars."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import scipy.stats

from benchmarks.claim import dense, dense_plan, design, schedule
from benchmarks.claim.measures import spread
from benchmarks.claim.report import table
from benchmarks.claim.results import Result

NAMES = {
    dense.CONTROL: "GRAIN",
    dense.CLIP: "CLIP",
    dense.TOWERS: "CLIP without decoder",
    dense.WORDS: "CLIP, descriptions in its captions",
}


class Measure(NamedTuple):
    """A column of the tables."""

    title: str
    of: Callable[[Result], float | None]
    scale: float = 100
    digits: int = 1


def _column(name: str) -> Callable[[Result], float | None]:
    return lambda row: row.get(name)


def _headline(row: Result) -> float:
    return schedule.by_description(row, "test")


MEASURES = {
    "miou": Measure("part mIoU, patches", _column("parts/miou")),
    "regions": Measure("regions", _column("parts_regions/miou")),
    "both": Measure("both", _column("parts_both/miou")),
    "background": Measure("patches, with background", _column("parts_background/miou")),
    "seen_parts": Measure("seen species", _column("parts_seen/miou")),
    "looks": Measure("looks, patches", _column("looks/miou")),
    "unseen": Measure("unseen, alpha 1", _headline),
    "half": Measure("alpha .5", _column("unseen_test/alpha_0.5/top1")),
    "seen": Measure("seen by name", _column("seen_test/alpha_1.0/top1")),
    "to_text": Measure("R@1 to text", _column("retrieval_test/image_to_text/r1")),
    "to_image": Measure("R@1 to image", _column("retrieval_test/text_to_image/r1")),
    "iou": Measure("IoU", _column("grounding/box_iou"), 1, 3),
    "region": Measure("region R@1, unseen", _column("grounding/region_to_description_r1")),
}
LEAST_GAIN = 10.0  # points of part mIoU over the control
MOST_LOSS = 2.0  # points of any other measure below the control
TIE = 1e-6  # points; less is rounding
_OWN_BARS = ("miou", "to_text", "to_image")
OTHERS = [key for key in MEASURES if key not in _OWN_BARS]

Groups = Mapping[str, Sequence[Result]]  # arm -> its rows


def label(arm: str) -> str:
    """An arm in words."""
    base, terms = dense.parts_of(arm)
    return ", ".join([NAMES[base], *(term.replace("_", " ") for term in terms)])


def report(studies: Mapping[str, Sequence[design.ClaimRun]], found: dense_plan.Results) -> None:
    """Prints all tables."""
    groups = {study: _grouped(runs, found) for study, runs in studies.items()}
    rows = [row for study in groups.values() for of_arm in study.values() for row in of_arm]
    if not rows:
        print("No run has finished yet.")
        return
    print(f"Device: {rows[0]['device']}, JAX {rows[0]['jax']}; mean ± standard deviation.\n")
    _print_choice(groups["equal steps"])
    print("The bars are asked of GRAIN with two terms at equal steps; the others are shown.\n")
    for study, arms in groups.items():
        if not arms:
            continue
        print(f"## {study[0].upper()}{study[1:]}\n")
        _print_costs(arms)
        _print_measures(arms)
        _print_leads(arms)
        _print_bars(arms)


def _grouped(runs: Sequence[design.ClaimRun], found: dense_plan.Results) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for run in runs:
        if run.name in found:
            groups.setdefault(run.arm, []).append(found[run.name])
    places = list(dense.RECIPES)
    return dict(sorted(groups.items(), key=lambda item: places.index(dense.parts_of(item[0])[0])))


def _values(rows: Sequence[Result], measure: Measure) -> dict[int, float]:
    """Seed -> value, of the rows that have the measure."""
    values = {row["seed"]: measure.of(row) for row in rows}
    return {seed: measure.scale * value for seed, value in values.items() if value is not None}


def _print_choice(arms: Groups) -> None:
    """The measures of validation, which choose the pair."""
    print("## Validation species: what chooses the pair\n")
    rows = []
    for term in dense.TERMS:
        of_term = arms.get(dense.arm_of(dense.CONTROL, (term,)), [])
        if of_term:
            miou = [row[dense_plan.VALIDATION_MIOU] for row in of_term]
            r1 = [dense_plan.retrieval(row, "validation") for row in of_term]
            rows.append([term, str(len(of_term)), spread(miou), spread(r1)])
    print(table(["term", "seeds", "part mIoU", "R@1, both ways"], rows) + "\n")


def _print_costs(arms: Groups) -> None:
    rows = []
    for arm, of_arm in arms.items():
        cells = [str(len(of_arm)), str(of_arm[0]["steps"])]
        cells += [spread([row["flops_per_step"] for row in of_arm[:1]], 1e-9)]
        cells += [spread([row["seconds"] for row in of_arm], 1 / 60)]
        cells += [spread([row["loss_image_caption"] for row in of_arm], 1, 2)]
        rows.append([label(arm), *cells])
    print(table(["arm", "seeds", "steps", "GFLOP a step", "minutes", "L_ic"], rows) + "\n")


def _print_measures(arms: Groups) -> None:
    """Means and deviations; and the seeds of what was asked."""
    shown = [m for m in MEASURES.values() if any(_values(rows, m) for rows in arms.values())]
    rows = []
    for arm, of_arm in arms.items():
        values = [(list(_values(of_arm, m).values()), m) for m in shown]
        rows.append([label(arm), *(spread(v, 1, m.digits) if v else "" for v, m in values)])
    print(table(["arm", *(m.title for m in shown)], rows) + "\n")
    asked = [MEASURES[key] for key in ("miou", "unseen", "to_text", "to_image", "region")]
    asked = [measure for measure in asked if measure in shown]
    rows = []
    for arm, of_arm in arms.items():
        each = [_values(of_arm, measure) for measure in asked]
        rows.append([label(arm), *(", ".join(f"{v[s]:.1f}" for s in sorted(v)) for v in each)])
    print(table(["by seed", *(m.title for m in asked)], rows) + "\n")


def leads(ours: Sequence[Result], theirs: Sequence[Result], measure: Measure) -> list[float]:
    """By how much `ours` are above `theirs`, of each seed that both have."""
    a, b = _values(ours, measure), _values(theirs, measure)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def _said(values: Sequence[float], digits: int) -> str:
    """The mean lead with its 95% interval, by Student's t over seeds."""
    mean = f"{fmean(values):+.{digits}f}"
    if len(values) < 2:
        return mean
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{mean} ({fmean(values) - half:+.{digits}f} to {fmean(values) + half:+.{digits}f})"


def _print_leads(arms: Groups) -> None:
    """Each arm with terms against its recipe without."""
    rows = []
    for arm, of_arm in arms.items():
        base, terms = dense.parts_of(arm)
        if terms and base in arms:
            found = [(leads(of_arm, arms[base], m), m) for m in MEASURES.values()]
            rows.append([label(arm), *(_said(v, m.digits) if v else "" for v, m in found)])
    if rows:
        header = ["lead over the recipe alone, 95% interval", *(m.title for m in MEASURES.values())]
        print(table(header, rows) + "\n")


class Bar(NamedTuple):
    """What was asked of an arm."""

    wanted: str
    got: str
    met: bool


def bars(arm: str, arms: Groups) -> list[Bar]:
    """The bars of a GRAIN arm with terms; means over the seeds that both have."""
    ours, control = arms[arm], arms.get(dense.CONTROL, [])
    found = []
    if gain := leads(ours, control, MEASURES["miou"]):
        wanted = f"part mIoU at least {LEAST_GAIN:g} points over the control"
        found.append(Bar(wanted, f"{fmean(gain):+.1f}", fmean(gain) >= LEAST_GAIN - TIE))
    clips = [rows for name, rows in arms.items() if dense.parts_of(name)[0] != dense.CONTROL]
    for key in ("to_text", "to_image") if clips else ():
        mean = lambda rows, measure=MEASURES[key]: fmean(_values(rows, measure).values())
        best = max(map(mean, clips))
        wanted = f"retrieval {MEASURES[key].title} at least that of the best CLIP"
        found.append(Bar(wanted, f"{mean(ours):.1f} against {best:.1f}", mean(ours) >= best - TIE))
    lost = {}
    for key in OTHERS:
        change = leads(ours, control, MEASURES[key])
        if change:
            lost[MEASURES[key].title] = fmean(change) * 100 / MEASURES[key].scale
    if lost:
        worst = min(lost, key=lost.__getitem__)
        wanted = f"nothing else more than {MOST_LOSS:g} points below the control"
        found.append(Bar(wanted, f"{worst} {lost[worst]:+.1f}", lost[worst] >= -MOST_LOSS - TIE))
    return found


def _print_bars(arms: Groups) -> None:
    rows = []
    for arm in arms:
        base, terms = dense.parts_of(arm)
        if base == dense.CONTROL and terms:
            rows += [
                [label(arm), bar.wanted, bar.got, "MET" if bar.met else "NOT MET"]
                for bar in bars(arm, arms)
            ]
    if rows:
        print(table(["arm", "bar", "got", ""], rows) + "\n")
