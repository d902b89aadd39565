"""GRAIN's three losses (method.md, Losses), with global meaning: they see the whole batch on any mesh.

    total = L_ic (image to caption) + L_box (matched boxes) + L_rd (region to description)

Similarities are float32 at HIGHEST precision: on TPU the default would cut the operands to bfloat16.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from grain_jax import boxes, matching, schema
from grain_jax.config import Loss


class Losses(NamedTuple):
    """The terms, unweighted, and their weighted sum; float32 scalars."""

    total: Array
    image_caption: Array
    region_description: Array
    box: Array
    matched_iou: Array  # mean IoU of the matched boxes; a measure, not a loss


def similarity(a: Float[Array, "*n D"], b: Float[Array, "*m D"]) -> Array:
    """Every a . b over the last axis: [G, n, D], [G, m, D] -> [G, n, m]."""
    return jnp.einsum(
        "...nd,...md->...nm",
        a,
        b,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _cross_entropy(logits, label_logits, allowed):
    """-log softmax of the labels over the last axis, where only `allowed` entries take part."""
    return jax.nn.logsumexp(jnp.where(allowed, logits, -jnp.inf), axis=-1) - label_logits


def image_caption_loss(
    image_embed: Float[Array, "B D"],
    text_embed: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    caption_id: Int[Array, "B"],
    *,
    mask_duplicates: bool,
) -> Float[Array, ""]:
    """L_ic: symmetric InfoNCE over the global batch (CLIP).

    With `mask_duplicates`, images with equal captions are not each other's negatives.
    """
    logits = logit_scale * similarity(image_embed, text_embed)  # [B, B]
    label_logits = jnp.diagonal(logits)
    allowed = jnp.ones_like(logits, bool)
    if mask_duplicates:
        own = jnp.eye(len(logits), dtype=bool)
        allowed = own | (caption_id[:, None] != caption_id[None])
    rows = _cross_entropy(logits, label_logits, allowed)
    columns = _cross_entropy(logits.T, label_logits, allowed.T)
    return (rows.mean() + columns.mean()) / 2


def _per_group(x, group_size: int):
    """[B, ...] -> [groups, images of the group, ...]; 0 = one group."""
    size = group_size or x.shape[0]
    return x.reshape(x.shape[0] // size, size, *x.shape[1:])  # no -1: there may be no regions


def _group_mean(total, count):
    """Mean over groups of total / count ([groups] each); a group with nothing to count adds 0."""
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 0.0).mean()


def box_loss(
    pred_boxes_cxcywh: Float[Array, "B Q 4"],
    target_boxes_cxcywh: Float[Array, "B R 4"],
    target_mask: Bool[Array, "B R"],
    match: matching.Match,
    *,
    group_size: int,
    iou_epsilon: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """L_box: (sum of L1 + sum of (1 - GIoU)) over matched pairs / number of real regions, a group at a time.

    Returns:
      (loss, mean plain IoU of the matched pairs).
    """
    pred = jnp.take_along_axis(pred_boxes_cxcywh, match.query_index[..., None], axis=1)  # [B, R, 4]
    l1 = jnp.abs(pred - target_boxes_cxcywh).sum(-1)
    pred_xyxy, target_xyxy = map(boxes.cxcywh_to_xyxy, (pred, target_boxes_cxcywh))
    overlap = boxes.giou(pred_xyxy, target_xyxy, epsilon=iou_epsilon)
    pair = jnp.where(match.valid, l1 + 1 - overlap, 0)  # [B, R]
    total = _per_group(pair, group_size).sum((1, 2))
    count = _per_group(target_mask, group_size).sum((1, 2))
    iou, _ = boxes.iou_and_union(pred_xyxy, target_xyxy)
    iou = jnp.where(match.valid, iou, 0).sum() / jnp.maximum(match.valid.sum(), 1)
    return _group_mean(total, count), jax.lax.stop_gradient(iou)


def region_description_loss(
    region_embed: Float[Array, "B Q D"],
    region_text_embed: Float[Array, "B R D"],
    logit_scale: Float[Array, ""],
    description_id: Int[Array, "B R"],
    description_mask: Bool[Array, "B R"],
    label_slot: Int[Array, "B R"],
    match: matching.Match,
    *,
    group_size: int,
    mask_duplicates: bool,
) -> Float[Array, ""]:
    """L_rd: each matched query against the descriptions of its group, cross-entropy with its own.

    Args:
      description_mask: which descriptions take part.
      label_slot: for each region, the place of its description in its image (its own place, but for the
        reference's quirk 1).
    """
    slots = description_id.shape[1]
    if slots == 0:  # a run without regions, such as the CLIP baseline
        return jnp.zeros(())
    pred = jnp.take_along_axis(region_embed, match.query_index[..., None], axis=1)  # [B, R, D]

    def flat(x):  # [B, R, ...] -> [groups, g*R, ...]
        x = _per_group(x, group_size)
        return x.reshape(x.shape[0], x.shape[1] * slots, *x.shape[3:])

    logits = logit_scale * similarity(flat(pred), flat(region_text_embed))  # [groups, g*R, g*R]
    label = flat(label_slot + jnp.arange(len(label_slot))[:, None] * slots)  # over the batch
    label %= logits.shape[-1]  # within the group
    allowed = jnp.broadcast_to(flat(description_mask)[:, None], logits.shape)
    if mask_duplicates:
        ids = flat(description_id)
        label_id = jnp.take_along_axis(ids, label, axis=1)
        is_label = label[..., None] == jnp.arange(logits.shape[-1])
        allowed &= is_label | (label_id[..., None] != ids[:, None])
    valid = flat(match.valid)  # [groups, g*R]
    # A row that does not count may have nothing allowed: keep its softmax finite, and its gradient 0.
    allowed |= ~valid[..., None]
    label_logits = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
    loss = jnp.where(valid, _cross_entropy(logits, label_logits, allowed), 0)
    return _group_mean(loss.sum(1), valid.sum(1))


def total_loss(
    outputs: schema.Outputs,
    batch: schema.Batch,
    config: Loss,
    *,
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = (),
) -> Losses:
    """All of GRAIN's losses on the outputs for a (global) batch.

    Args:
      mesh, batch_axes: how the leading axes are sharded (see `matching.match`).
    """
    image_caption = image_caption_loss(
        outputs.image_embed,
        outputs.text_embed,
        outputs.logit_scale,
        batch.caption_id,
        mask_duplicates=config.mask_duplicates,
    )
    target = batch.region_boxes_cxcywh
    # A box without area (after clipping) is no target.
    box_mask = batch.region_mask & (target[..., 2:] > 0).all(-1)
    description_mask, label_slot = box_mask, jnp.arange(target.shape[1])
    label_slot = jnp.broadcast_to(label_slot, box_mask.shape)
    if config.shift_labels_after_empty_box:
        # DIFFERS by default: the reference drops the box but keeps its description, so that the labels
        # of the image's later boxes fall on the descriptions before theirs (quirk 1).
        description_mask = batch.region_mask
        slots_of_texts = jnp.argsort(~description_mask, axis=1, stable=True)
        rank = jnp.maximum(jnp.cumsum(box_mask, axis=1) - 1, 0)
        label_slot = jnp.take_along_axis(slots_of_texts, rank, axis=1)

    cosine = None
    if config.match_description:
        cosine = similarity(outputs.region_embed, outputs.region_text_embed)  # [B, Q, R]

    def matched_box_loss(pred):
        with jax.named_scope("matching"):
            cost = matching.cost_matrix(
                pred,
                target,
                l1=config.match_l1,
                giou=config.match_giou,
                iou_epsilon=config.iou_epsilon,
                description=config.match_description,
                cosine=cosine,
            )
            match = matching.match(cost, box_mask, mesh=mesh, batch_axes=batch_axes)
        loss, iou = box_loss(
            pred,
            target,
            box_mask,
            match,
            group_size=config.group_size,
            iou_epsilon=config.iou_epsilon,
        )
        return loss, iou, match

    box, matched_iou, match = matched_box_loss(outputs.pred_boxes_cxcywh[-1])
    if config.deep_supervision:
        for pred in outputs.pred_boxes_cxcywh[:-1]:
            box += matched_box_loss(pred)[0]
    region_description = region_description_loss(
        outputs.region_embed,
        outputs.region_text_embed,
        outputs.logit_scale,
        batch.description_id,
        description_mask,
        label_slot,
        match,
        group_size=config.group_size,
        mask_duplicates=config.mask_duplicates,
    )
    total = (
        config.image_caption * image_caption
        + config.box * box
        + config.region_description * region_description
    )
    return Losses(total, image_caption, region_description, box, matched_iou)
