"""The plan of the fourth design: which runs each study has, as far as the results of others let it be known."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks.claim import dense, design
from benchmarks.claim.results import Result

Results = Mapping[str, Result]  # name of a finished run -> its row
# The measures that choose the pair: images of validation species, none of which the report shows.
VALIDATION_MIOU = "parts_validation/miou"


def retrieval(result: Result, split: str) -> float:
    """R@1, the mean of both directions."""
    ways = ("image_to_text", "text_to_image")
    return statistics.fmean(result[f"retrieval_{split}/{way}/r1"] for way in ways)


def of_arm(found: Results, arm: str, steps: int, data: str = dense.MAIN) -> list[Result]:
    """The rows of an arm, in the order of the seeds."""
    names = [dense.run_of(arm, seed, steps, data).name for seed in dense.SEEDS]
    return [found[name] for name in names if name in found]


def best_two(found: Results, steps: int) -> tuple[str, str] | None:
    """The pair of terms: that with the highest part mIoU, and of the others that with the highest retrieval R@1.

    Both are those of the bars that the control misses, of validation, as means over all seeds of GRAIN with one term.
    None before all of these have run.
    """
    rows = {
        term: of_arm(found, dense.arm_of(dense.CONTROL, (term,)), steps) for term in dense.TERMS
    }
    if any(len(of_term) < len(dense.SEEDS) for of_term in rows.values()):
        return None

    def best(terms: Sequence[str], measure: Callable[[Result], float]) -> str:
        return max(terms, key=lambda term: statistics.fmean(map(measure, rows[term])))

    first = best(list(rows), lambda row: row[VALIDATION_MIOU])
    others = [term for term in rows if term != first]
    return first, best(others, lambda row: retrieval(row, "validation"))


def best_clip(found: Results, arms: Sequence[str], steps: int) -> str | None:
    """Of the arms that are no GRAIN that with the highest retrieval R@1 of validation, the mean over all seeds.

    None before all of these have run.
    """
    rows = {
        arm: of_arm(found, arm, steps) for arm in arms if dense.parts_of(arm)[0] != dense.CONTROL
    }
    if any(len(of_clip) < len(dense.SEEDS) for of_clip in rows.values()):
        return None
    mean = lambda arm: statistics.fmean(retrieval(row, "validation") for row in rows[arm])
    return max(rows, key=mean)


def plan(found: Results, *, steps: int, clothes: bool) -> dict[str, list[design.ClaimRun]]:
    """Study -> its runs; those that need the pair or the best CLIP are absent until it is chosen.

    Args:
      found: the results.
      steps: training steps of the main comparison.
      clothes: whether there is a folder of clothes.
    """
    runs = lambda arms, data=dense.MAIN: [
        dense.run_of(arm, seed, steps, data) for seed in dense.SEEDS for arm in arms
    ]
    studies = {"equal steps": runs(dense.SINGLES)}
    pair = best_two(found, steps)
    if pair is None:
        return studies
    pairs = [dense.arm_of(base, pair) for base in (dense.CONTROL, dense.CLIP, dense.TOWERS)]
    studies["equal steps"] += [run for run in runs(pairs) if run not in studies["equal steps"]]
    clip = best_clip(found, [*dense.SINGLES, *pairs], steps)
    if clip is None:
        return studies
    alone = [dense.arm_of(dense.CONTROL, (term,)) for term in pair]
    if clothes:
        arms = [dense.CONTROL, *alone, pairs[0], dense.CLIP, pairs[1], clip, dense.WORDS]
        studies["clothes"] = runs(dict.fromkeys(arms), dense.CLOTHES)
    ours = found.get(dense.run_of(pairs[0], dense.SEEDS[0], steps).name)
    if ours is None:
        return studies
    arms = [dense.CONTROL, dense.CLIP, *alone, pairs[0], pairs[1], clip]
    studies["equal FLOPs"] = [
        dense.run_of(arm, seed, fair(found, arm, steps, ours["flops_per_step"]))
        for seed in dense.SEEDS
        for arm in dict.fromkeys(arms)
        if of_arm(found, arm, steps)
    ]
    return studies


def fair(found: Results, arm: str, steps: int, flops: float, data: str = dense.MAIN) -> int:
    """Steps in which an arm needs these FLOPs a step of `steps`; the same steps where these differ by 5% or less."""
    return equal_steps(steps, flops, of_arm(found, arm, steps, data)[0]["flops_per_step"])


def equal_steps(steps: int, flops: float, own: float) -> int:
    """Steps of `own` FLOPs that cost what `steps` of `flops` cost; the same steps where these differ by 5% or less."""
    equal = round(steps * flops / own)
    return equal if abs(equal / steps - 1) > 0.05 else steps


def order(studies: Mapping[str, list[design.ClaimRun]]) -> list[design.ClaimRun]:
    """All runs; of each study the first seed first."""
    return list(dict.fromkeys(run for runs in studies.values() for run in runs))
