"""Hungarian matching of region queries to real regions, inside the compiled step (docs/method.md, Losses).

Small problems (at most 6 queries and 6 regions; GRAIN has 5 and 5) are solved exactly, by the minimum over
all injections, without a loop. Larger ones use `optax.assignment`; call it inside `jax.shard_map`, as the
losses do: under plain jit all chips would synchronise the condition of its while loop at every turn.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from grain_jax.core import boxes

EXACT_UP_TO = 6  # 6! = 720 candidates


class Match(NamedTuple):
    """The query of each region."""

    query_index: Int[Array, "B R"]  # 0 if not valid
    valid: Bool[Array, "B R"]  # real and matched


def cost_matrix(
    pred_boxes_cxcywh: Float[Array, "B Q 4"],
    target_boxes_cxcywh: Float[Array, "B R 4"],
    *,
    l1: float,
    giou: float,
    iou_epsilon: float = 0.0,
    description: float = 0.0,
    cosine: Float[Array, "B Q R"] | None = None,
) -> Float[Array, "B Q R"]:
    """l1 * |p - t|_1 - giou * GIoU(p, t) - description * cosine of every query and region of an image.

    Args:
      cosine: between the embedding of each query and of each description; None: its term is 0.
    """
    pred, target = pred_boxes_cxcywh[:, :, None], target_boxes_cxcywh[:, None]
    distance = jnp.abs(pred - target).sum(-1)
    overlap = boxes.giou(boxes.cxcywh_to_xyxy(pred), boxes.cxcywh_to_xyxy(target), epsilon=iou_epsilon)
    cost = l1 * distance - giou * overlap
    return cost if cosine is None else cost - description * cosine


@functools.cache
def _injections(queries: int, regions: int) -> np.ndarray:
    """All assignments of different queries to the regions, int32 [ways, R]; numbers >= Q are "no query"."""
    size = max(queries, regions)
    ways = sorted({way[:regions] for way in itertools.permutations(range(size))})
    return np.array(ways, np.int32).reshape(-1, regions)


def _exact(cost, mask):
    """Minimum over all injections: cost [B, Q, R], mask [B, R] -> query of each region [B, R] (Q: none)."""
    _, queries, regions = cost.shape
    ways = _injections(queries, regions)  # [W, R]
    usable = jnp.isfinite(cost)
    # Ordered by: real regions without a query, then pairs without a finite cost, then the cost.
    total: Any = 0.0  # [B, W] from the first region on, as `unusable`
    unusable: Any = 0.0
    missing = jnp.asarray(ways >= queries)
    for r in range(regions):
        column = ways[:, r].clip(max=queries - 1)
        real = mask[:, r, None] & ~missing[:, r]  # [B, W]
        total += jnp.where(real, jnp.where(usable, cost, 0)[:, column, r], 0)
        bad = jnp.where(missing[:, r], regions + 1, ~usable[:, column, r])
        unusable += jnp.where(mask[:, r, None], bad, 0)
    total = jnp.where(unusable == unusable.min(axis=1, keepdims=True), total, jnp.inf)
    return jnp.asarray(ways)[jnp.argmin(total, axis=1)]


def _hungarian(cost, mask):
    """As `_exact`, by the O(n^3) algorithm of optax, one image at a time."""
    _, queries, regions = cost.shape
    real = mask[:, None, :] & jnp.isfinite(cost)
    low = jnp.min(jnp.where(real, cost, jnp.inf), axis=(1, 2), keepdims=True)
    low = jnp.where(jnp.isfinite(low), low, 0)
    cost = jnp.where(real, cost - low, 0)
    spread = jnp.max(cost, axis=(1, 2), keepdims=True)
    spread = jnp.where(spread == 0, 1, spread)
    # One unusable pair must cost more than any set of usable ones. A region that is not real costs
    # nothing if queries suffice, else a little more than any pair, so that real ones are matched first.
    # The penalties are no larger than that, because large ones cost float32 digits.
    unusable = mask[:, None, :] & ~real
    penalty = spread * (min(queries, regions) + 1)
    padding = 2 * jnp.where(unusable.any((1, 2), keepdims=True), penalty, spread)
    cost = jnp.where(unusable, penalty, cost)
    cost = jnp.where(mask[:, None, :], cost, 0.0 if queries >= regions else padding)

    def assignment(c):
        row, column = optax.assignment.hungarian_algorithm(c)
        return jnp.full(regions, queries, jnp.int32).at[column].set(row.astype(jnp.int32))

    return jax.vmap(assignment)(cost)


def match(cost: Float[Array, "B Q R"], mask: Bool[Array, "B R"]) -> Match:
    """The assignment of queries to real regions with the least total cost; no gradient flows through it.

    If regions outnumber queries, every query is matched. A pair whose cost is not finite is taken only if no
    other pair is left; its loss is not finite either, and the trainer stops.

    Args:
      cost: of every query and region.
      mask: which regions are real.
    """
    cost = jax.lax.stop_gradient(cost)
    _, queries, regions = cost.shape
    if regions == 0 or queries == 0:
        return Match(jnp.zeros(mask.shape, jnp.int32), jnp.zeros_like(mask))
    solve = _exact if max(queries, regions) <= EXACT_UP_TO else _hungarian
    query = solve(cost, mask)
    valid = mask & (query < queries)
    return Match(jnp.where(valid, query, 0), valid)
