"""Shares of right answers: ties, chance, and 95% intervals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from grain_jax.inference import scores as scores_lib
from grain_jax.losses.contrastive import TIE

_Z = 1.959963984540054  # 97.5% quantile of the normal distribution, for two-sided 95% intervals


def topk_hits(scores: np.ndarray, right: np.ndarray, k: int, tie: float | np.ndarray = TIE) -> np.ndarray:
    """The chance, for each row, that a right candidate is among the k best, ties being broken at random.

    So a model that gives every class the same score has the accuracy of chance. Equal float32 cosines differ
    by up to 2.4e-7, since BLAS sums each product in another order; training counts up to TIE as equal. Each
    score is compared with the best right one alone, so that no chain of small steps makes far scores equal.

    Args:
      scores: [N, C].
      right: bool [N, C], at least one True per row; or int [N], the right candidate of each row.
      k: 1 or more.
      tie: scores nearer to the best right one are equal to it; [N, 1], or one number for all rows.

    Returns: float64 [N] in [0, 1]; 0 or 1 where no tie matters.
    """
    if right.ndim == 1:
        right = right[:, None] == np.arange(scores.shape[1])
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    above = (~right & (scores > best + tie)).sum(axis=1)
    tied = (scores >= best - tie) & (scores <= best + tie)
    tied_wrong, tied_right = (~right & tied).sum(axis=1), (right & tied).sum(axis=1)
    # Draws without replacement that include a right one (hypergeometric).
    tied, draws = tied_right + tied_wrong, np.clip(k - above, 0, tied_right + tied_wrong)
    return 1.0 - np.asarray(special.comb(tied_wrong, draws)) / special.comb(tied, draws)


def nearest_hits(
    embed: np.ndarray, candidates: np.ndarray, right: np.ndarray, ks: Sequence[int] = (1, 5)
) -> list[np.ndarray]:
    """For each k `topk_hits` by dot products of `embed` [N, D] and `candidates` [C, D]; `right` as there."""

    def hits(part: np.ndarray, right: np.ndarray) -> list[np.ndarray]:
        similarity = part @ candidates.T
        return [topk_hits(similarity, right, k) for k in ks]

    return scores_lib.in_parts(hits, embed, right)


def interval(successes: float, count: float) -> tuple[float, float]:
    """The 95% interval of a share by Wilson 1927, (low, high); (0, 1) if `count` is 0."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = successes / count, _Z * _Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    half /= 1 + z2 / count
    return max(0.0, centre - half), min(1.0, centre + half)


def rate(name: str, hits: np.ndarray) -> dict[str, float]:
    """The mean of `hits` [N] under `name`, with its 95% interval as `name_low` and `name_high`."""
    total, count = float(np.sum(hits)), len(hits)
    low, high = interval(total, count)
    return {name: total / count if count else 0.0, f"{name}_low": low, f"{name}_high": high}


def mean_rate(name: str, shares: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """The mean of the classes' `shares` [C] under `name`, with a 95% interval; `counts` [C] >= 1: answers n.

    The variance of the mean is the sum of p (1 - p) / n, divided by C^2. With one p for all classes that is
    the variance of a share among C^2 / (sum of 1/n) answers, whose Wilson interval is returned. If p differs
    between classes, the interval is wider than needed, and never too narrow for equal n.
    """
    mean, number = float(shares.mean()), len(shares) ** 2 / (1 / counts).sum()
    low, high = interval(mean * number, number)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def chance_of_classes(count: int) -> dict[str, float]:
    """`chance` (of top-1) and `chance_top5` among so many classes."""
    return {"chance": 1 / count, "chance_top5": min(1.0, 5 / count)}


def counts_of_classes(target: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """What a result says of images of the right classes `target`, int [N]: counts and chance."""
    counts = np.bincount(target, minlength=len(classes))
    return {
        "classes": len(classes),
        "images": len(target),
        **chance_of_classes(len(classes)),
        "images_per_class": dict(zip(classes, counts.tolist())),
    }


def of_classes(top1: np.ndarray, top5: np.ndarray, target: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Accuracy by the hits [N] of `topk_hits`, the right classes int [N] and the names of C classes.

    Returns: `top1`, `top5`, `mean_per_class` (of top-1), each with `_low` and `_high`, and `per_class`: name
      -> top-1, of classes with answers.
    """
    counts = np.bincount(target, minlength=len(classes))
    there = np.flatnonzero(counts)
    shares = np.bincount(target, weights=top1, minlength=len(classes))[there] / counts[there]
    return {
        **rate("top1", top1),
        **rate("top5", top5),
        **mean_rate("mean_per_class", shares, counts[there]),
        "per_class": dict(zip([classes[i] for i in there], shares.tolist())),
    }
