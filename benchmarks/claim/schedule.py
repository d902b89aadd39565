"""The plan of `benchmarks.claim`: which runs each study has, as far as the results of others let it be known."""

from collections.abc import Mapping
from typing import Any

from benchmarks.claim import design


def by_description(result: Mapping[str, Any], split: str) -> float:
    """Top-1 of unseen classes by their descriptions, alpha 1, asked in the way that is best for the validation classes."""
    way = max(design.WAYS, key=lambda way: result[f"{way}_validation/alpha_1.0/top1"])
    return result[f"{way}_{split}/alpha_1.0/top1"]


def validation_score(result: Mapping[str, Any]) -> float:
    """The score that chooses the learning rate of an arm: unseen classes by description; seen names for "clip"."""
    if result["arm"] == "clip":
        return result["seen_validation/alpha_1.0/top1"]
    return by_description(result, "validation")


def best_rate(results: Mapping[str, Mapping[str, Any]], arm: str, steps: int) -> float | None:
    """The learning rate of an arm with the best validation score on the first seed; None before all have run."""
    scores = {}
    for rate in design.RATES:
        result = results.get(design.ClaimRun(arm, rate, design.SEEDS[0], steps).name)
        if result is None:
            return None
        scores[rate] = validation_score(result)
    return max(scores, key=scores.get)


def plan(
    results: Mapping[str, Mapping[str, Any]], *, steps: int, aviaries: bool
) -> dict[str, list[design.ClaimRun]]:
    """Study -> its runs; runs that depend on a learning rate are absent until it is chosen.

    Args:
      results: name of a finished run -> its row.
      steps: training steps of the main comparison.
      aviaries: whether data sets other than the main one can be drawn.
    """
    first = design.SEEDS[0]
    studies = {
        "grid": [design.ClaimRun(a, r, first, steps) for a in design.ARMS for r in design.RATES]
    }
    best = {arm: best_rate(results, arm, steps) for arm in design.ARMS}
    known = [arm for arm in design.ARMS if best[arm] is not None]
    studies["equal steps"] = [
        design.ClaimRun(a, best[a], seed, steps) for seed in design.SEEDS for a in known
    ]
    if best[design.OURS] is None:
        return studies
    if aviaries:
        studies["poses"] = [
            design.ClaimRun(a, best[a], seed, steps, "poses")
            for seed in design.SEEDS
            for a in known
        ]
    flops = {
        a: results[design.ClaimRun(a, best[a], first, steps).name]["flops_per_step"] for a in known
    }
    fair = {a: round(steps * flops[design.OURS] / flops[a]) for a in known if a in design.CLIP_ARMS}
    studies["equal FLOPs"] = [
        design.ClaimRun(a, best[a], seed, fair[a] if abs(fair[a] / steps - 1) > 0.05 else steps)
        for seed in design.SEEDS
        for a in fair
    ]
    return studies


def order(studies: Mapping[str, list[design.ClaimRun]]) -> list[design.ClaimRun]:
    """All runs, the most informative first, so that an interrupted plan has results of every study."""
    first = [
        run for s in ("grid", "equal steps") for run in studies[s] if run.arm in design.KEY_ARMS
    ]
    poses = [run for run in studies.get("poses", []) if run.arm in design.KEY_ARMS]
    rest = [run for runs in studies.values() for run in runs]
    return list(dict.fromkeys([*first, *studies["grid"], *poses, *rest]))
