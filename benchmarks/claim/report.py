"""Tables and charts of `benchmarks.claim`: means and standard deviations over seeds, differences with intervals."""

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import scipy.stats

from benchmarks.claim import charts, design, schedule
from benchmarks.claim.measures import (
    COLUMNS,
    GROUNDING,
    LABELS,
    cell,
    faults,
    headline,
    health,
    spread,
)
from benchmarks.claim.results import Result


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _rows(groups: Mapping[str, Sequence[Result]], columns: Mapping[str, tuple]) -> list[list[str]]:
    return [
        [label, str(results[0]["steps"]), *(cell(results, *column) for column in columns.values())]
        for label, results in groups.items()
        if results
    ]


def _grouped(
    runs: Sequence[design.ClaimRun], results: Mapping[str, Result]
) -> dict[str, list[Result]]:
    """Label -> results of its finished runs, in the order of the plan."""
    groups: dict[str, list[Result]] = {}
    order = list(design.ARMS)
    for run in sorted(runs, key=lambda run: order.index(run.arm)):
        if run.name in results:
            groups.setdefault(LABELS[run.arm], []).append(results[run.name])
    return groups


def report(
    studies: Mapping[str, Sequence[design.ClaimRun]],
    results: Mapping[str, Result],
    pictures: pathlib.Path | None,
) -> None:
    """Prints the tables of all studies; draws `claim_arms.png` and the like in the folder `pictures`, unless None."""
    main = _grouped(studies.get("equal steps", []), results)
    if not main:
        print("No arm has finished its learning rates yet.")
        return
    any_result = next(iter(main.values()))[0]
    print(f"Device: {any_result['device']}, JAX {any_result['jax']}; mean ± standard deviation.\n")
    _print_rates(studies, results)
    poses = _grouped(studies.get("poses", []), results)
    ours = {LABELS[design.OURS]: main.get(LABELS[design.OURS], [])}
    fair = _grouped(studies.get("equal FLOPs", []), results) | ours
    titles = {"Equal steps": main, "Equal FLOPs": fair, "Harder poses": poses}
    for title, groups in titles.items():
        if len(groups) > 1:
            print(f"## {title}\n")
            _print_health(groups)
            _print_main(groups)
            _print_differences(groups)
    if pictures:
        for name, groups in (("arms", main), ("poses", poses)):
            if groups:
                charts.draw_arms(groups, pictures / f"claim_{name}.png")


def print_recorded(text: str) -> None:
    """Prints tables/recorded.tsv: lines of text, and rows of cells with tabs between them as Markdown."""
    for has_cells, lines in itertools.groupby(text.splitlines(), lambda line: "\t" in line):
        rows = [line.split("\t") for line in lines]
        print(table(rows[0], rows[1:]) if has_cells else "\n".join(row[0] for row in rows))


def _print_rates(studies, results) -> None:
    print("## Learning rates (first seed, validation classes)\n")
    rows = []
    for arm in design.ARMS:
        runs = [run for run in studies["grid"] if run.arm == arm and run.name in results]
        cells = [f"{100 * schedule.validation_score(results[run.name]):.1f}" for run in runs]
        rows.append([LABELS[arm], *cells, *["-"] * (len(design.RATES) - len(cells))])
    print(table(["arm", *(f"{rate:g}" for rate in design.RATES)], rows) + "\n")


def _print_health(main) -> None:
    rows = []
    for label, results in main.items():
        found = sorted({fault for result in results for fault in faults(result)})
        row = [label, str(len(results)), f"{results[0]['rate']:g}"]
        row += [spread([health(r) for r in results], 1, 2), cell(results, "logit_scale", 1)]
        row += [cell(results, "seconds", 1 / 60), cell(results[:1], "flops_per_step", 1e-9)]
        rows.append([*row, "; ".join(found) or "trained"])
    header = ["arm", "seeds", "lr", "L_ic / chance", "logit scale", "minutes", "GFLOP a step", ""]
    print(table(header, rows) + "\n")


def _print_main(groups) -> None:
    chance = next(iter(groups.values()))[0]
    keys = ["seen_test/chance", *["unseen_test/chance"] * 7]
    keys += [f"retrieval/{way}/chance_r1" for way in ("image_to_text", "text_to_image")]
    row = ["chance", "", *(cell([chance], key) for key in keys)]
    print(table(["", "steps", *COLUMNS], _rows(groups, COLUMNS) + [row]) + "\n")
    regions = {k: v for k, v in groups.items() if v and "grounding_unseen/box_iou" in v[0]}
    if regions:
        # The chance level depends on the predicted boxes; this one is of the boxes of OURS.
        by = regions.get(LABELS[design.OURS], list(regions.values())[-1])[0]
        keys = {key.replace("/", "/chance_"): form for key, *form in GROUNDING.values()}
        row = ["chance", "", *(cell([by], key, *form) for key, form in keys.items())]
        print(table(["", "steps", *GROUNDING], _rows(regions, GROUNDING) + [row]) + "\n")


def _print_differences(groups) -> None:
    """The headline, seed by seed: points by which OURS leads each arm."""
    ours = {r["seed"]: headline(r) for r in groups.get(LABELS[design.OURS], [])}
    if not ours:
        return
    rows = []
    for label, results in groups.items():
        values = {r["seed"]: headline(r) for r in results}
        both = sorted(set(values) & set(ours))
        lead = [100 * (ours[seed] - values[seed]) for seed in both]
        is_ours, half = label == LABELS[design.OURS], math.nan
        if len(lead) > 1:  # Student's t over seeds
            half = scipy.stats.t.ppf(0.975, len(lead) - 1) * stdev(lead) / math.sqrt(len(lead))
        rows.append(
            [
                label,
                ", ".join(f"{100 * values[seed]:.1f}" for seed in sorted(values)),
                spread(list(values.values())),
                "" if is_ours else ", ".join(f"{x:+.1f}" for x in lead),
                "" if is_ours else f"{fmean(lead) - half:+.1f} to {fmean(lead) + half:+.1f}",
            ]
        )
    header = ["unseen by description, alpha 1", "by seed", "mean"]
    header += [f"lead of {LABELS[design.OURS]}", "95% interval"]
    print(table(header, rows) + "\n")
