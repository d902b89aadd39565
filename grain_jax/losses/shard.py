"""What a loss term gets and gives: the images of one device, and sums and counts over them.

A loss term is a function of a `Shard` that returns a `Mean`, a `GroupMean`, or a `TermOutput` with further
numbers to log. It runs inside `jax.shard_map`. A shard has the images of one device and the texts of all
devices, which are gathered once a step. `total.total_loss` adds the sums and counts of all devices up, so a
term that only averages over its images needs no collective.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grain_jax.config import Loss
from grain_jax.core import schema
from grain_jax.losses import matching, streaming
from grain_jax.losses.layout import GroupLayout


class Mean(NamedTuple):
    """A mean over all images: the sum on this device, and how many values it has."""

    sum: Float[Array, "*n"]
    count: Float[Array, ""]


class GroupMean(NamedTuple):
    """A mean over groups of each group's mean: the sums and counts of the groups that this device holds.

    A group without values counts as 0.
    """

    sum: Float[Array, "g"]  # g = layout.groups_per_shard
    count: Float[Array, "g"]


class TermOutput(NamedTuple):
    """The loss of a term, and further numbers to log (without a gradient)."""

    loss: Mean | GroupMean
    measures: Mapping[str, Mean | GroupMean]


class Targets(NamedTuple):
    """What the losses compare with; equal ids are not each other's negatives."""

    caption_id: Int[Array, "b C"]
    boxes_cxcywh: Float[Array, "b R 4"]
    box_mask: Bool[Array, "b R"]  # real regions whose box has an area: those that are matched
    description_id: Int[Array, "b R"]
    description_mask: Bool[Array, "b R"]  # descriptions that take part
    label_slot: Int[Array, "b R"]  # where the description of each region is in its image


class Shard(NamedTuple):
    """The images of one device, b of them, as a loss term sees them."""

    outputs: schema.Outputs  # its `scales` are the same on all devices
    batch: schema.Batch  # ids, boxes and masks; images, tokens and where texts lie are None
    targets: Targets
    match: matching.Match  # of the queries of the last decoder layer and the regions
    captions: streaming.Columns  # of all devices; their mask: captions that exist
    descriptions: streaming.Columns  # of all devices; their masks: regions that exist, `description_mask`
    group_descriptions: streaming.Columns  # the same of the groups of this device, with a leading axis
    layout: GroupLayout
    config: Loss
    reference: bool = False  # `config.reference` of the run
    negatives: Mapping[str, streaming.Pair] = {}  # of rows and texts, by loss (contrastive.against_texts)

    @property
    def embedded(self) -> Bool[Array, "b R"]:
        """The boxes of `box_mask` that have an embedding: one without a kept patch has zeros."""
        return self.targets.box_mask & (self.outputs.box_embed != 0).any(-1)

    @property
    def agreement(self) -> Float[Array, "b R"]:
        """What each region counts in L_box, L_rd and L_bd: 1, or a share with `loss.agreement`; no gradient.

        The share is the probability, by the box head's embedding of the annotated box, that the region has
        its own description and no other of its image. Detectors confuse the descriptions of an image, so a
        box with the wrong one counts little once the model knows better; at first all count alike.
        """
        outputs, targets = self.outputs, self.targets
        if not self.config.agreement:
            return jnp.ones(targets.box_mask.shape)
        ids, real = targets.description_id, targets.description_mask
        itself = jnp.eye(ids.shape[1], dtype=bool)
        compared = (real[:, None] & (ids[:, :, None] != ids[:, None])) | itself
        cosine = streaming.similarity(outputs.box_embed, outputs.region_text_embed)  # [b, R, R]
        logits = jnp.where(compared, outputs.scales.of_regions[0] * cosine, -jnp.inf)
        share = jnp.diagonal(jax.nn.softmax(logits, axis=-1), axis1=1, axis2=2)
        return jax.lax.stop_gradient(jnp.where(real, share, 0))


class Term(Protocol):
    """A loss term: contrastive.image_caption is one."""

    def __call__(self, shard: Shard, /) -> Mean | GroupMean | TermOutput: ...


def make_shard(
    outputs: schema.Outputs,
    batch: schema.Batch,
    *,
    config: Loss,
    layout: GroupLayout,
    reference: bool = False,
) -> Shard:
    """The images of this device with their targets, matched."""
    targets = _targets(batch, config, layout, reference)
    match = match_regions(outputs.pred_boxes_cxcywh[:, -1], outputs, targets, config, reference)
    captions = _columns(outputs.text_embed, targets.caption_id, batch.caption_mask)
    masks = batch.region_mask, targets.description_mask
    of_device = _columns(outputs.region_text_embed, targets.description_id, *masks)
    descriptions = streaming.gathered(of_device, layout.everywhere)
    of_groups = descriptions
    if layout.in_group != layout.everywhere:
        of_groups = streaming.gathered(of_device, layout.in_group)
    return Shard(
        outputs,
        batch,
        targets,
        match,
        captions=streaming.gathered(captions, layout.everywhere),
        descriptions=descriptions,
        group_descriptions=jax.tree.map(layout.per_group, of_groups),
        layout=layout,
        config=config,
        reference=reference,
    )


def _columns(embed: Float[Array, "b S D"], ids: Int[Array, "b S"], *masks: Bool[Array, "b S"]):
    """The texts of the images as columns, b S of them."""
    real = jnp.stack([mask.reshape(-1) for mask in masks], axis=-1)
    return streaming.Columns(embed.reshape(-1, embed.shape[-1]), ids.reshape(-1), real)


def iou_epsilon(reference: bool) -> float:
    """What is added to the union in the IoU (quirk 15)."""
    return 1e-4 if reference else 0.0


def match_regions(
    pred_boxes_cxcywh: Float[Array, "b Q 4"],
    outputs: schema.Outputs,
    targets: Targets,
    config: Loss,
    reference: bool = False,
) -> matching.Match:
    """The matching of the queries with these boxes and the regions (docs/method.md, Losses)."""
    with jax.named_scope("matching"):
        cosine = None
        if config.match_description:
            cosine = streaming.similarity(outputs.region_embed, outputs.region_text_embed)
        cost = matching.cost_matrix(
            pred_boxes_cxcywh,
            targets.boxes_cxcywh,
            l1=config.match_l1,
            giou=config.match_giou,
            iou_epsilon=iou_epsilon(reference),
            description=config.match_description,
            cosine=cosine,
        )
        return matching.match(cost, targets.box_mask)


def _targets(batch: schema.Batch, config: Loss, layout: GroupLayout, reference: bool) -> Targets:
    target = batch.region_boxes_cxcywh
    # A box without area (after clipping) is no target.
    box_mask = batch.region_mask & (target[..., 2:] > 0).all(-1)
    description_mask = box_mask
    label_slot = jnp.broadcast_to(jnp.arange(target.shape[1]), box_mask.shape)
    if reference:
        # It drops the box but keeps its description, so that the labels of the image's later boxes fall on
        # the descriptions before theirs (quirk 1).
        description_mask = batch.region_mask
        slots_of_texts = jnp.argsort(~description_mask, axis=1, stable=True)
        rank = jnp.maximum(jnp.cumsum(box_mask, axis=1) - 1, 0)
        label_slot = jnp.take_along_axis(slots_of_texts, rank, axis=1)
    caption_id, description_id = batch.caption_id, batch.description_id
    if not config.mask_duplicates:  # equal texts count as different ones
        caption_id = _unique_ids(caption_id.shape, layout.everywhere)
        description_id = _unique_ids(description_id.shape, layout.everywhere)
    return Targets(caption_id, target, box_mask, description_id, description_mask, label_slot)


def _unique_ids(shape: tuple[int, ...], axes: tuple[str, ...]) -> Int[Array, "..."]:
    """Numbers that no other entry on the devices along these axes has."""
    ids = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
    return ids + math.prod(shape) * jax.lax.axis_index(axes) if axes else ids
