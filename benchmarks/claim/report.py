"""Tables and charts of `benchmarks.claim`: means and standard deviations over seeds, differences with intervals."""

import itertools
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import scipy.stats
from matplotlib.figure import Figure

from benchmarks.claim import design
from benchmarks.claim.results import Result

LABELS = {
    "clip": "CLIP, web captions",
    "clip_descriptions": "CLIP, descriptions in its captions",
    "clip_captions": "CLIP, two captions",
    "clip_image_description": "CLIP, L_id",
    "clip_both": "CLIP, L_id, two captions",
    "clip_pooled": "CLIP, L_id, two captions, pooled",
    "grain": "GRAIN",
    "grain_image_description": "GRAIN, L_id",
    "grain_captions": "GRAIN, two captions",
    "grain_both": "GRAIN, L_id, two captions",
    "grain_pooled": "GRAIN, L_id, two captions, pooled",
    "grain_boxes": "GRAIN, L_id, two captions, pooled, L_bd",
}


def headline(result: Result) -> float:
    """Top-1 of the unseen test classes by description, alpha 1 (`design.by_description`)."""
    return design.by_description(result, "test")


def health(result: Result) -> float:
    """Final L_ic over its value for embeddings that know nothing: ln B for one caption an image."""
    batch = result["batch_size"]
    captions = design.ARMS[result["arm"]].get("input.captions_per_image", 1)
    return result["loss_image_caption"] / math.log(batch * (1 + captions * (batch - 1))) * 2


def faults(result: Result) -> list[str]:
    """Signs that a run did not train; empty for a healthy one."""
    found = []
    if health(result) >= 0.9:
        found.append(f"L_ic is {health(result):.2f} of its chance value")
    seen, chance = (result[f"seen_test/{key}"] for key in ("alpha_1.0/top1", "chance"))
    half_way = (1 + chance) / 2  # of few classes, 10 times chance is more than all
    least, said = min((10 * chance, "10 times chance"), (half_way, "half way from chance to all"))
    if seen < least:
        found.append(f"seen names are at {100 * seen:.1f}%, less than {said}")
    return found


def spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation of values times `scale`."""
    values = [scale * value for value in values]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean (Student's t over seeds)."""
    mean, n = statistics.mean(values), len(values)
    half = scipy.stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _cell(results: Sequence[Result], key: str, scale: float = 100, digits: int = 1) -> str:
    values = [r[key] for r in results if key in r]
    return spread(values, scale, digits) if values else "-"


COLUMNS = {  # heading -> column of the results, scale, digits
    "seen by name": ("seen_test/alpha_1.0/top1", 100, 1),
    "unseen, mean": ("unseen_test/alpha_1.0/top1", 100, 1),
    "of unit length": ("unit_test/alpha_1.0/top1", 100, 1),
    "one sentence": ("sentence_test/alpha_1.0/top1", 100, 1),
    ".75": ("unseen_test/alpha_0.75/top1", 100, 1),
    ".5": ("unseen_test/alpha_0.5/top1", 100, 1),
    ".25": ("unseen_test/alpha_0.25/top1", 100, 1),
    "0": ("unseen_test/alpha_0.0/top1", 100, 1),
    "retrieval R@1, to text": ("retrieval/image_to_text/r1", 100, 1),
    "to image": ("retrieval/text_to_image/r1", 100, 1),
}
GROUNDING = {
    "IoU, unseen": ("grounding_unseen/box_iou", 1, 3),
    "Acc@0.5": ("grounding_unseen/box_acc50", 100, 1),
    "region to description R@1, seen": ("grounding_seen/region_to_description_r1", 100, 1),
    "unseen": ("grounding_unseen/region_to_description_r1", 100, 1),
    "phrase to box Acc@0.5, unseen": ("grounding_unseen/phrase_acc50", 100, 1),
}


def _rows(groups: Mapping[str, Sequence[Result]], columns: Mapping[str, tuple]) -> list[list[str]]:
    return [
        [label, str(results[0]["steps"]), *(_cell(results, *column) for column in columns.values())]
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
    charts: pathlib.Path | None,
) -> None:
    """Prints the tables of all studies; draws `claim_arms.png` and the like in the folder `charts`, unless None."""
    main = _grouped(studies.get("equal steps", []), results)
    if not main:
        print("No arm has finished its learning rates yet.")
        return
    any_result = next(iter(main.values()))[0]
    print(f"Device: {any_result['device']}, JAX {any_result['jax']}; mean ± standard deviation.\n")
    _print_rates(studies, results)
    ours = {LABELS[design.OURS]: main.get(LABELS[design.OURS], [])}
    for title, groups in (
        ("Equal steps", main),
        ("Equal FLOPs", _grouped(studies.get("equal FLOPs", []), results) | ours),
        ("Harder poses", _grouped(studies.get("poses", []), results)),
    ):
        if len(groups) > 1:
            print(f"## {title}\n")
            _print_health(groups)
            _print_main(groups)
            _print_differences(groups)
    poses = _grouped(studies.get("poses", []), results)
    if charts:
        _draw_arms(main, charts / "claim_arms.png")
    if charts and poses:
        _draw_arms(poses, charts / "claim_poses.png")


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
        cells = [f"{100 * design.validation_score(results[run.name]):.1f}" for run in runs]
        rows.append([LABELS[arm], *cells, *["-"] * (len(design.RATES) - len(cells))])
    print(table(["arm", *(f"{rate:g}" for rate in design.RATES)], rows) + "\n")


def _print_health(main) -> None:
    rows = []
    for label, results in main.items():
        found = sorted({fault for result in results for fault in faults(result)})
        row = [label, str(len(results)), f"{results[0]['rate']:g}"]
        row += [spread([health(r) for r in results], 1, 2), _cell(results, "logit_scale", 1)]
        row += [_cell(results, "seconds", 1 / 60), _cell(results[:1], "flops_per_step", 1e-9)]
        rows.append([*row, "; ".join(found) or "trained"])
    header = ["arm", "seeds", "lr", "L_ic / chance", "logit scale", "minutes", "GFLOP a step", ""]
    print(table(header, rows) + "\n")


def _print_main(groups) -> None:
    chance = next(iter(groups.values()))[0]
    keys = ["seen_test/chance", *["unseen_test/chance"] * 7]
    keys += [f"retrieval/{way}/chance_r1" for way in ("image_to_text", "text_to_image")]
    row = ["chance", "", *(_cell([chance], key) for key in keys)]
    print(table(["", "steps", *COLUMNS], _rows(groups, COLUMNS) + [row]) + "\n")
    regions = {k: v for k, v in groups.items() if v and "grounding_unseen/box_iou" in v[0]}
    if regions:
        # The chance level depends on the predicted boxes; this one is of the boxes of OURS.
        by = regions.get(LABELS[design.OURS], list(regions.values())[-1])[0]
        keys = {key.replace("/", "/chance_"): form for key, *form in GROUNDING.values()}
        row = ["chance", "", *(_cell([by], key, *form) for key, form in keys.items())]
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
        low, high = _interval(lead) if len(lead) > 1 else (math.nan, math.nan)
        is_ours = label == LABELS[design.OURS]
        rows.append(
            [
                label,
                ", ".join(f"{100 * values[seed]:.1f}" for seed in sorted(values)),
                spread(list(values.values())),
                "" if is_ours else ", ".join(f"{x:+.1f}" for x in lead),
                "" if is_ours else f"{low:+.1f} to {high:+.1f}",
            ]
        )
    header = ["unseen by description, alpha 1", "by seed", "mean"]
    header += [f"lead of {LABELS[design.OURS]}", "95% interval"]
    print(table(header, rows) + "\n")


_STYLE = {design.OURS: "#2ca02c", "clip_both": "#d62728"}


def _draw_arms(main, path: pathlib.Path) -> None:
    """For each arm its seeds as dots and their mean as a bar: unseen classes by description, seen ones by name."""
    figure = Figure(figsize=(11, 0.5 * len(main) + 1.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = list(main)[::-1]
    seen = lambda r: r["seen_test/alpha_1.0/top1"]
    for axis, title, measure, key in (
        (left, "classes never seen, by description, alpha 1", headline, "unseen_test/chance"),
        (right, "seen classes, by name", seen, "seen_test/chance"),
    ):
        for y, label in enumerate(labels):
            values = [100 * measure(result) for result in main[label]]
            colour = _STYLE.get(main[label][0]["arm"], "#1f77b4")
            axis.barh(y, statistics.mean(values), height=0.55, color=colour, alpha=0.35)
            axis.plot(values, [y] * len(values), "o", color=colour, markersize=5)
            axis.text(max(values) + 2, y, f"{statistics.mean(values):.0f}", va="center", fontsize=9)
        axis.axvline(100 * main[labels[0]][0][key], color="#555555", linestyle=":")
        axis.set_xlim(0, 108)
        axis.set_xlabel("top-1, % (dotted: chance)", fontsize=9)
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(labels)), labels, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"![{path.stem}]({path})\n")
