"""The box loss: L1 and GIoU of each region and its matched query (docs/method.md, Losses)."""

import jax
import jax.numpy as jnp

from grain_jax.core import boxes, schema
from grain_jax.losses import matching
from grain_jax.losses.shard import GroupMean, Mean, Shard, Targets, TermOutput, iou_epsilon, match_regions


def box(shard: Shard) -> TermOutput:
    """L_box: L1 + (1 - GIoU) of the matched boxes, a mean over the boxes of the group.

    With `loss.deep_supervision` the losses of all decoder layers are added, each with a matching of its own.
    With a pointer, `loss.token_boxes` times the loss of the patches is added; `token_boxes` measures it.
    Measures, over the matched regions: `matched_iou` (mean IoU), `matched_iou50` (share with boxes.FOUND_IOU
    or more) and `query_share` [Q] (share of them that each query has).
    """
    outputs, targets, config = shard.outputs, shard.targets, shard.config
    loss, iou = _l1_and_giou(outputs.pred_boxes_cxcywh[:, -1], shard, shard.match)
    if config.deep_supervision:
        for pred in jnp.moveaxis(outputs.pred_boxes_cxcywh, 1, 0)[:-1]:
            match = match_regions(pred, outputs, targets, config, shard.reference)
            loss += _l1_and_giou(pred, shard, match)[0]
    sum_of_group = lambda x: shard.layout.per_group(x).sum((1, 2)).astype(jnp.float32)
    counts = jnp.where(targets.box_mask, shard.agreement, 0)
    measures = {}
    if outputs.token_boxes is not None:
        of_tokens = _of_tokens(outputs.token_boxes, targets)
        loss += config.token_boxes * of_tokens
        real = targets.box_mask.sum().astype(jnp.float32)
        measures["token_boxes"] = Mean(of_tokens.sum(), real)
    match = shard.match
    matched = sum_of_group(match.valid).sum()
    share = lambda x: Mean(x.astype(jnp.float32), matched)
    queries = jnp.arange(outputs.region_embed.shape[1])
    uses = match.valid[..., None] & (match.query_index[..., None] == queries)  # [b, R, Q]
    measures["matched_iou"] = share(iou.sum())
    if match.valid.shape[1] and len(queries):  # a run with regions and queries
        measures["matched_iou50"] = share((iou >= boxes.FOUND_IOU).sum())
        measures["query_share"] = share(uses.sum((0, 1)))
    return TermOutput(GroupMean(sum_of_group(counts * loss), sum_of_group(counts)), measures)


def _of_tokens(tokens: schema.TokenBoxes, targets: Targets):
    """The loss of the patches, by region: [b, R], 0 where none is real (docs/method.md, Pointer).

    For a region, L1 + 1 - GIoU of its patches, a mean, and the cross-entropy of "shows an object", a mean
    over all patches. A patch is of the smallest box that its centre lies in (FCOS, Tian et al. 2019).
    """
    target, real = targets.boxes_cxcywh, targets.box_mask
    distance = jnp.abs(tokens.centre_xy[:, None] - target[:, :, None, :2])  # [b, R, P, 2]
    inside = (distance < target[:, :, None, 2:] / 2).all(-1) & real[..., None]
    area = jnp.where(inside, target[..., 2:].prod(-1)[..., None], jnp.inf)
    assigned = inside & (area == area.min(axis=1, keepdims=True))  # [b, R, P]
    pred, target = tokens.boxes_cxcywh[:, None], target[:, :, None]
    giou = boxes.giou(boxes.cxcywh_to_xyxy(pred), boxes.cxcywh_to_xyxy(target))
    each = jnp.where(assigned, jnp.abs(pred - target).sum(-1) + 1 - giou, 0)
    mean = each.sum(-1) / jnp.maximum(assigned.sum(-1), 1)
    shows = inside.any(axis=1)
    entropy = jax.nn.softplus(jnp.where(shows, -tokens.logit, tokens.logit)).mean(-1)
    return jnp.where(real, mean + entropy[:, None], 0)


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
