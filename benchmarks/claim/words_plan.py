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
    studies["eased poses"] = runs(words.ARMS, words.MAIN)
    studies[SECOND] = _second_round(found, steps)
    ours = found.get(words.run_of(words.OURS, words.SEEDS[0], steps, words.POSES).name)
    if ours is not None:
        arms = (words.GRAIN, words.OURS, *(arm for arm in words.ARMS if arm.startswith(words.CLIP)))
        studies["equal FLOPs"] = [
            words.run_of(
                arm,
                seed,
                dense_plan.fair(found, arm, steps, ours["flops_per_step"], words.POSES),
                words.POSES,
            )
            for seed in words.SEEDS
            for arm in arms
            if dense_plan.of_arm(found, arm, steps, words.POSES)
        ]
    if clothes:
        asked = chosen(found, steps)
        arms = [a for a in words.ARMS if a == asked or not a.endswith(("+3", "+10"))]
        studies["clothes"] = runs([*arms, words.CLOTHES_ARM], words.CLOTHES)
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
