"""Tables of the fourth design: every arm of every study, what chose the pair, leads over the control, and the bars."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from benchmarks.claim import compared, dense, dense_plan, design, schedule
from benchmarks.claim.compared import TIE, Bar, Groups, Measure, column, leads, values
from benchmarks.claim.measures import spread
from benchmarks.claim.report import table
from benchmarks.claim.results import Result

NAMES = {
    dense.CONTROL: "GRAIN",
    dense.CLIP: "CLIP",
    dense.TOWERS: "CLIP without decoder",
    dense.WORDS: "CLIP, descriptions in its captions",
}


def _headline(row: Result) -> float:
    return schedule.by_description(row, "test")


MEASURES = {
    "miou": Measure("part mIoU, patches", column("parts/miou")),
    "regions": Measure("regions", column("parts_regions/miou")),
    "both": Measure("both", column("parts_both/miou")),
    "background": Measure("patches, with background", column("parts_background/miou")),
    "seen_parts": Measure("seen species", column("parts_seen/miou")),
    "looks": Measure("looks, patches", column("looks/miou")),
    "unseen": Measure("unseen, alpha 1", _headline),
    "half": Measure("alpha .5", column("unseen_test/alpha_0.5/top1")),
    "seen": Measure("seen by name", column("seen_test/alpha_1.0/top1")),
    "to_text": Measure("R@1 to text", column("retrieval_test/image_to_text/r1")),
    "to_image": Measure("R@1 to image", column("retrieval_test/text_to_image/r1")),
    "iou": Measure("IoU", column("grounding/box_iou"), 1, 3),
    "region": Measure("region R@1, unseen", column("grounding/region_to_description_r1")),
}
ASKED = ("miou", "unseen", "to_text", "to_image", "region")  # seed by seed
LEAST_GAIN = 10.0  # points of part mIoU over the control
MOST_LOSS = 2.0  # points of any other measure below the control
_OWN_BARS = ("miou", "to_text", "to_image")
OTHERS = [key for key in MEASURES if key not in _OWN_BARS]


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
        compared.print_costs(arms, label)
        compared.print_measures(arms, label, MEASURES, ASKED)
        compared.print_leads(arms, label, MEASURES, lambda arm: dense.parts_of(arm)[0])
        asked = [arm for arm in arms if arm.startswith(f"{dense.CONTROL}+")]
        compared.print_bars({arm: bars(arm, arms) for arm in asked}, label)


def _grouped(runs: Sequence[design.ClaimRun], found: dense_plan.Results) -> dict[str, list[Result]]:
    groups = compared.grouped(runs, found)
    places = list(dense.RECIPES)
    return dict(sorted(groups.items(), key=lambda item: places.index(dense.parts_of(item[0])[0])))


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


def bars(arm: str, arms: Groups) -> list[Bar]:
    """The bars of a GRAIN arm with terms; means over the seeds that both have."""
    ours, control = arms[arm], arms.get(dense.CONTROL, [])
    found = []
    if gain := leads(ours, control, MEASURES["miou"]):
        wanted = f"part mIoU at least {LEAST_GAIN:g} points over the control"
        found.append(Bar(wanted, f"{fmean(gain):+.1f}", fmean(gain) >= LEAST_GAIN - TIE))
    clips = [rows for name, rows in arms.items() if dense.parts_of(name)[0] != dense.CONTROL]
    for key in ("to_text", "to_image") if clips else ():
        mean = lambda rows, measure=MEASURES[key]: fmean(values(rows, measure).values())
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
