"""Tables of the fifth design: every arm of every study, leads over the recipe without a text decoder, and the bars."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from benchmarks.claim import compared, dense_report, design, words, words_plan
from benchmarks.claim.compared import TIE, Bar, Groups, Measure, column, values

LEARNT = {words.STOP: "its gradient stopped"}
LABELS = {
    words.POSES: "100% true annotations",
    words.TENTH: "10% alone",
    words.ANNOTATED: "10%, and 90% by its model",
}  # of the second round

_OF_RERANKING = {"to text": "image_to_text", "to image": "text_to_image"}
MEASURES = {
    **{
        f"{stage} {way}": Measure(f"R@1 {way}{said}", column(f"{stage}_test/{key}/r1"))
        for stage, said in (("retrieval", ""), ("reranked", ", reranked"))
        for way, key in _OF_RERANKING.items()
    },
    "weight": Measure("weight", column("reranked_test/weight"), 1, 2),
    "point": Measure("pointing Acc@.5", column("grounding_all/point/phrase_acc50")),
    "point_unseen": Measure("unseen species", column("grounding/point/phrase_acc50")),
    "point_iou": Measure("pointing IoU", column("grounding_all/point/phrase_iou"), 1, 3),
    "phrase": Measure("phrase Acc@.5, by regions", column("grounding_all/phrase_acc50")),
    "likely": Measure("by likelihood, unseen species", column("grounding/likelihood/phrase_acc50")),
    "exact": Measure("exact descriptions", column("descriptions_all/description_exact")),
    "exact_unseen": Measure("unseen species", column("descriptions/description_exact")),
    "parts": Measure("parts named in captions", column("captions_all/caption_parts")),
    "parts_unseen": Measure("unseen species", column("captions/caption_parts")),
    "unseen": dense_report.MEASURES["unseen"],
    "half": dense_report.MEASURES["half"],
    "zero": Measure("alpha 0", column("unseen_test/alpha_0.0/top1")),
    "seen": dense_report.MEASURES["seen"],
    "miou": Measure("part mIoU, patches", column("parts/miou")),
    "negatives": Measure("hard negatives, by likelihood", column("hard_negatives/likelihood/top1")),
    "box_head": Measure("by the box head", column("hard_negatives/box_head/top1")),
    "query": Measure("by the region", column("hard_negatives/region/top1")),
    "image": Measure("by the image", column("hard_negatives/image/top1")),
    "captions": Measure(
        "in captions, by likelihood", column("hard_negatives/captions/likelihood/top1")
    ),
    "captions_image": Measure("by the image", column("hard_negatives/captions/image/top1")),
    "iou": dense_report.MEASURES["iou"],
    "region": dense_report.MEASURES["region"],
}
ASKED = (*(f"{s} {w}" for s in ("retrieval", "reranked") for w in _OF_RERANKING), "point", "exact")
LEAST_POINTING = 85.0  # %, of all test images


def label(arm: str) -> str:
    """An arm, or a data set of the second round, in words."""
    if arm in LABELS:
        return LABELS[arm]
    base, weight = words.parts_of(arm)
    named = dense_report.NAMES[base]
    return named if weight is None else f"{named}, {LEARNT.get(weight, f'weight {weight}')}"


def report(
    studies: Mapping[str, Sequence[design.ClaimRun]], found: words_plan.Results, steps: int
) -> None:
    """Prints all tables."""
    groups = {
        study: compared.grouped(runs, found, _data if study == words_plan.SECOND else _arm)
        for study, runs in studies.items()
    }
    rows = [row for study in groups.values() for of_arm in study.values() for row in of_arm]
    if not rows:
        print("No run has finished yet.")
        return
    print(f"Device: {rows[0]['device']}, JAX {rows[0]['jax']}; mean ± standard deviation.\n")
    asked = words_plan.chosen(found, steps)
    chosen = label(asked) if asked else "one that validation has yet to choose"
    print(f"The bars are asked of {chosen}; those of others are shown.\n")
    for study, arms in groups.items():
        if arms:
            print(f"## {study[0].upper()}{study[1:]}\n")
            compared.print_costs(arms, label)
            compared.print_measures(arms, label, MEASURES, ASKED)
            _print_leads(study, arms)
            if study != words_plan.SECOND:
                compared.print_bars({arm: bars(arm, arms) for arm in arms}, label)


def _arm(run: design.ClaimRun) -> str:
    return run.arm


def _data(run: design.ClaimRun) -> str:
    return run.data


def _print_leads(study: str, arms: Groups) -> None:
    if study == words_plan.SECOND:
        title = f"lead over {LABELS[words.TENTH]}"
        compared.print_leads(arms, label, MEASURES, lambda _: words.TENTH, title)
    else:
        compared.print_leads(arms, label, MEASURES, lambda arm: words.parts_of(arm)[0])


def bars(arm: str, arms: Groups) -> list[Bar]:
    """The bars of an arm; none of a CLIP, or of one without a text decoder.

    The best CLIP is that with the highest value of the tests: of each seed without reranking, of the means with it.
    """
    base, weight = words.parts_of(arm)
    if base != words.GRAIN or weight is None:
        return []
    ours = arms[arm]
    clips = [rows for name, rows in arms.items() if words.parts_of(name)[0] != words.GRAIN]
    return [
        *_of_every_seed(ours, clips),
        *_of_means(ours, clips),
        *_of_pointing(ours),
    ]


def _of_every_seed(ours, clips) -> list[Bar]:
    """Reranked, against CLIP without."""
    found = []
    for way in _OF_RERANKING:
        own = values(ours, MEASURES[f"reranked {way}"])
        others = [values(rows, MEASURES[f"retrieval {way}"]) for rows in clips]
        best = {s: max(v[s] for v in others if s in v) for s in own if any(s in v for v in others)}
        points = [own[seed] - best[seed] for seed in sorted(best)]
        if points:
            wanted = f"R@1 {way}, reranked, above the best CLIP without in every seed"
            got = ", ".join(f"{x:+.1f}" for x in points)
            found.append(Bar(wanted, got, min(points) > TIE))
    return found


def _of_means(ours, clips) -> list[Bar]:
    """Both reranked."""
    found = []
    for way in _OF_RERANKING:
        measure = MEASURES[f"reranked {way}"]
        own = values(ours, measure)
        means = [fmean(v.values()) for rows in clips if (v := values(rows, measure))]
        if own and means:
            wanted = f"R@1 {way}, reranked, above the best CLIP with it on the mean"
            mean, best = fmean(own.values()), max(means)
            found.append(Bar(wanted, f"{mean:.1f} against {best:.1f}", mean > best + TIE))
    return found


def _of_pointing(ours) -> list[Bar]:
    own = values(ours, MEASURES["point"])
    if not own:
        return []
    mean = fmean(own.values())
    wanted = f"pointing Acc@0.5 at least {LEAST_POINTING:g}%"
    return [Bar(wanted, f"{mean:.1f}", mean >= LEAST_POINTING - TIE)]
