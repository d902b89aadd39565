"""The plan of the fifth design: which runs each study has, as far as the results of others let it be known."""

import statistics
from collections.abc import Mapping

from benchmarks.claim import dense_plan, design, words
from benchmarks.claim.results import Result

Results = Mapping[str, Result]  # name of a finished run -> its row
SECOND = "second round"


def reranked(result: Result, split: str) -> float:
    """R@1 with reranking, the mean of both directions."""
    ways = ("image_to_text", "text_to_image")
    return statistics.fmean(result[f"reranked_{split}/{way}/r1"] for way in ways)


def chosen(found: Results, steps: int) -> str | None:
    """The GRAIN with a text decoder of which the bars are asked: the best R@1 with reranking of validation.

    The mean over all seeds, harder poses; None before all of these have run.
    """
    arms = [f"{words.GRAIN}+{weight}" for weight in words.WEIGHTS]
    rows = {arm: dense_plan.of_arm(found, arm, steps, words.POSES) for arm in arms}
    if any(len(of_arm) < len(words.SEEDS) for of_arm in rows.values()):
        return None
    mean = lambda arm: statistics.fmean(reranked(row, "validation") for row in rows[arm])
    return max(arms, key=mean)


def plan(found: Results, *, steps: int, clothes: bool) -> dict[str, list[design.ClaimRun]]:
    """Study -> its runs; those that need the results of others are absent until these are there.

    Args:
      found: the results.
      steps: training steps of all studies but that of equal FLOPs.
      clothes: whether there is a folder of clothes.
    """
    runs = lambda arms, data: [
        words.run_of(arm, seed, steps, data) for seed in words.SEEDS for arm in arms
    ]
    studies = {"harder poses": runs(words.ARMS, words.POSES)}
    studies[SECOND] = _second_round(found, steps)
    asked = chosen(found, steps)
    if asked is None:
        return studies
    arms = (words.GRAIN, asked, words.CLIP, f"{words.CLIP}+1")
    studies["eased poses"] = runs(arms, words.MAIN)
    ours = found[words.run_of(asked, words.SEEDS[0], steps, words.POSES).name]
    fair = {
        arm: dense_plan.fair(found, arm, steps, ours["flops_per_step"], words.POSES)
        for arm in arms
        if dense_plan.of_arm(found, arm, steps, words.POSES)
    }
    studies["equal FLOPs"] = [
        words.run_of(arm, seed, fair[arm], words.POSES) for seed in words.SEEDS for arm in fair
    ]
    if clothes:
        studies["clothes"] = runs((*arms, words.CLOTHES_ARM), words.CLOTHES)
    return studies


def _second_round(found: Results, steps: int) -> list[design.ClaimRun]:
    """All true annotations, a tenth of them, and that with what its model annotates, once it has run."""
    runs = []
    for seed in words.SEEDS:
        every, tenth, own = (
            words.run_of(words.OURS, seed, steps, data)
            for data in (words.POSES, words.TENTH, words.ANNOTATED)
        )
        runs += [every, tenth, *([own] if tenth.name in found else [])]
    return runs
