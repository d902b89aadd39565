"""Zero-shot scores from embeddings of any length, in numpy; C are classes, n_c the texts of class c."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grain_jax.core import schema

AT_ONCE = 256  # rows of `in_parts`


def unit(x: np.ndarray) -> np.ndarray:
    """`x` [..., D] as float32, normalised to unit length over the last axis; zeros stay zeros."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def in_parts(function: Callable[..., Sequence[np.ndarray]], *arrays: np.ndarray) -> list[np.ndarray]:
    """Calls `function` on AT_ONCE rows at a time, which bounds its memory, and joins what it returns."""
    starts = range(0, max(len(arrays[0]), 1), AT_ONCE)
    parts = [function(*(x[first : first + AT_ONCE] for x in arrays)) for first in starts]
    return [np.concatenate(each) for each in zip(*parts)]


def class_features(text_embeds: Sequence[np.ndarray], unit_length: bool = False) -> np.ndarray:
    """For each class the mean of its unit-length text embeddings [n_c, D], float32 [C, D].

    With `unit_length` the means are normalised, as OpenAI's CLIP and open_clip do. Otherwise, as in the
    reference, the less alike the texts of a class, the shorter its feature and the lower its scores.
    """
    means = np.stack([unit(embeds).mean(axis=0) for embeds in text_embeds])
    return unit(means) if unit_length else means


def global_scores(image_embed: np.ndarray, features: np.ndarray) -> np.ndarray:
    """image_embed [B, D] and class features [C, D] -> float32 [B, C]."""
    return unit(image_embed) @ np.asarray(features, np.float32).T


def region_scores(
    region_embed: np.ndarray,
    description_embeds: Sequence[np.ndarray],
    by: str = "mean",
    prior: np.ndarray | None = None,
) -> np.ndarray:
    """The region score of each class, float32 [B, C] (docs/method.md, Zero-shot evaluation).

    Args:
      region_embed: [B, Q, D].
      description_embeds: for each class the embeddings of its descriptions, [n_c, D], n_c >= 1.
      by: "mean" averages the queries' cosines with the best description of the class, as the paper does.
        "best" averages the descriptions' cosines with the best query.
      prior: [B, Q], added to the cosines of a region; None: 0.
    """
    counts = [len(embeds) for embeds in description_embeds]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    descriptions = unit(np.concatenate(list(description_embeds)))  # [sum of n_c, D]

    def scores_of(part: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray]:
        similarity = unit(part) @ descriptions.T + prior[..., None]  # [b, Q, sum of n_c]
        if by == "best":
            return (np.add.reduceat(similarity.max(axis=1), starts, axis=-1) / counts,)
        return (np.maximum.reduceat(similarity, starts, axis=-1).mean(axis=1),)

    prior = np.zeros(region_embed.shape[:2], np.float32) if prior is None else prior
    return in_parts(scores_of, region_embed, prior)[0]


def best_pairs(
    score: np.ndarray, boxes_xyxy: np.ndarray | None, most: int, threshold: float = -np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """The positions of the regions and texts with the `most` highest scores, best first, int [n] each.

    Args:
      score: [Q, K], of regions and texts.
      boxes_xyxy: [Q, 4]. A text's regions with an IoU above 0.5 to a better one are left out; None: none is.
      most: pairs at most.
      threshold: the lowest score.
    """
    score = np.asarray(score, np.float64)
    if boxes_xyxy is not None and len(score):
        boxes = np.asarray(boxes_xyxy, np.float64)
        low = np.maximum(boxes[:, None, :2], boxes[:, :2])
        both = np.maximum(np.minimum(boxes[:, None, 2:], boxes[:, 2:]) - low, 0).prod(axis=-1)
        area = both.diagonal()
        covers = both > 0.5 * (area[:, None] + area - both)  # [Q, Q]
        kept = np.zeros(score.shape, bool)
        columns = np.arange(score.shape[1])
        for best in np.argsort(-score, axis=0, kind="stable"):  # of each text, [K]
            kept[best, columns] = ~(covers[best] & kept.T).any(axis=1)
        score = np.where(kept, score, -np.inf)
    flat = score.ravel()
    best = np.argpartition(-flat, most)[:most] if len(flat) > most else np.arange(len(flat))
    best = best[np.lexsort((best, -flat[best]))]
    best = best[(flat[best] >= threshold) & (flat[best] > -np.inf)]
    return np.divmod(best, score.shape[1])


def likeliest(regions: schema.Regions, most: int) -> schema.Regions:
    """`most` proposals of each image: those with the highest prior first.

    Those that overlap a better one by an IoU above 0.5 come after all others.
    """
    chosen = []
    for boxes_xyxy, prior in zip(regions.boxes_xyxy, regions.prior):
        first, _ = best_pairs(prior[:, None], boxes_xyxy, len(prior))
        order = np.argsort(-prior, kind="stable")
        chosen.append(np.concatenate([first, order[~np.isin(order, first)]])[:most])
    take = lambda x: np.stack([each[i] for each, i in zip(x, chosen)])
    return schema.Regions(*map(take, regions))


def combine(global_: np.ndarray, region: np.ndarray | None, alpha: float) -> np.ndarray:
    """alpha * global + (1 - alpha) * region, float32 [B, C]; `region` may be None if alpha is 1."""
    if alpha == 1.0:
        return global_
    assert region is not None
    return np.float32(alpha) * global_ + np.float32(1.0 - alpha) * region


def region_map(cosines: Any, boxes_xyxy: Any, grid: int, xp: Any = np) -> Any:
    """Cosines [N, Q] of texts and regions as maps, float32 [N, grid, grid], of the best that covers a cell.

    A region that covers a share of a cell counts there in that share, above the lowest cosine of the text; a
    cell without a region has the lowest. `boxes_xyxy` [Q, 4] is in [0, 1], `xp` numpy or jax.numpy.
    """
    low = np.arange(grid) / grid

    def covered(first, last):  # [Q] each -> [Q, grid], the share of each row or column
        ends = xp.minimum(last[:, None], low + 1 / grid) - xp.maximum(first[:, None], low)
        return xp.clip(ends * grid, 0, 1)

    x1, y1, x2, y2 = xp.asarray(boxes_xyxy, np.float32).T
    share = covered(y1, y2)[:, :, None] * covered(x1, x2)[:, None]
    lowest = cosines.min(axis=1, keepdims=True)
    above = ((cosines - lowest)[..., None, None] * share).max(axis=1)
    return (lowest[..., None] + above).astype(np.float32)


def bilinear(size: int, cells: int) -> np.ndarray:
    """The bilinear weights of `cells` at `size` pixels, [size, cells], centres on centres, the edge held."""
    positions = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(cells)))


def resize_map(maps: np.ndarray, width: int, height: int) -> np.ndarray:
    """Maps [N, h, w] -> float32 [N, height, width], `bilinear`."""
    maps = np.asarray(maps, np.float32)
    rows, columns = bilinear(height, maps.shape[1]), bilinear(width, maps.shape[2])
    return np.einsum("yh,nhw,xw->nyx", rows, maps, columns).astype(np.float32)
