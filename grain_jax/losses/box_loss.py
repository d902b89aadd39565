"""The box loss: L1 and GIoU of each region and its matched query (docs/method.md, Losses)."""

import jax
import jax.numpy as jnp

from grain_jax.losses import boxes, matching
from grain_jax.losses.shard import (
    GroupMean,
    Mean,
    Shard,
    TermOutput,
    iou_epsilon,
    match_regions,
)


def box(shard: Shard) -> TermOutput:
    """L_box: L1 + (1 - GIoU) of the matched boxes, a mean over the boxes of the group.

    With `loss.deep_supervision` the losses of all decoder layers are added, each with a matching of its own.
    Measures, over the matched regions: `matched_iou` (mean IoU), `matched_iou50` (share with boxes.FOUND_IOU
    or more) and `query_share` [Q] (share of them that each query has).
    """
    outputs, targets, config = shard.outputs, shard.targets, shard.config
    loss, iou = _l1_and_giou(outputs.pred_boxes_cxcywh[-1], shard, shard.match)
    if config.deep_supervision:
        for pred in outputs.pred_boxes_cxcywh[:-1]:
            match = match_regions(pred, outputs, targets, config, shard.reference)
            loss += _l1_and_giou(pred, shard, match)[0]
    sum_of_group = lambda x: shard.layout.per_group(x).sum((1, 2)).astype(jnp.float32)
    match = shard.match
    matched = sum_of_group(match.valid).sum()
    share = lambda x: Mean(x.astype(jnp.float32), matched)
    queries = jnp.arange(outputs.region_embed.shape[1])
    uses = match.valid[..., None] & (match.query_index[..., None] == queries)  # [b, R, Q]
    measures = {"matched_iou": share(iou.sum())}
    if match.valid.shape[1] and len(queries):  # a run with regions and queries
        measures["matched_iou50"] = share((iou >= boxes.FOUND_IOU).sum())
        measures["query_share"] = share(uses.sum((0, 1)))
    return TermOutput(GroupMean(sum_of_group(loss), sum_of_group(targets.box_mask)), measures)


def _l1_and_giou(pred_boxes_cxcywh, shard: Shard, match: matching.Match):
    """(loss, plain IoU without gradient) of each region, [b, R]; 0 where none is matched."""
    target = shard.targets.boxes_cxcywh
    if pred_boxes_cxcywh.shape[1] == 0:  # a model without queries
        return jnp.zeros(match.valid.shape), jnp.zeros(match.valid.shape)
    pred = jnp.take_along_axis(pred_boxes_cxcywh, match.query_index[..., None], axis=1)  # [b, R, 4]
    l1 = jnp.abs(pred - target).sum(-1)
    pred_xyxy, target_xyxy = map(boxes.cxcywh_to_xyxy, (pred, target))
    giou = boxes.giou(pred_xyxy, target_xyxy, epsilon=iou_epsilon(shard.reference))
    iou, _ = boxes.iou_and_union(pred_xyxy, target_xyxy)
    at_matches = lambda x: jnp.where(match.valid, x, 0)
    return at_matches(l1 + 1 - giou), jax.lax.stop_gradient(at_matches(iou))
