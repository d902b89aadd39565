"""GRAIN's three losses (docs/method.md, Losses), with global meaning: they see the whole batch on any mesh.

    total = L_ic (image to caption) + L_box (matched boxes) + L_rd (region to description)

`total_loss` runs `_losses_of_shard` on every device inside one `jax.shard_map`. Each device works out the
rows of its own images, with the columns of all others streaming by (`streaming.py`), and hands out sums
and counts; the division is done outside, since a count may span devices. All of it is float32.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from grain_jax import config as config_lib
from grain_jax import errors, schema
from grain_jax.config import Loss
from grain_jax.losses import boxes, matching, streaming
from grain_jax.losses.streaming import Columns, Ring

TIE = 1e-5  # cosines nearer than this are equal but for rounding


class Losses(NamedTuple):
    """The terms, unweighted, and their weighted sum; then measures of the batch. float32."""

    total: Array
    image_caption: Array
    region_description: Array
    box: Array
    matched_iou: Array  # mean IoU of the matched boxes
    matched_iou50: Array  # share of them with boxes.FOUND_IOU or more
    image_caption_accuracy: Array  # share of images nearer to their caption than to any negative
    region_description_accuracy: Array  # share of matched regions nearer to their description
    query_share: Float[Array, "Q"]  # share of the matched regions that each query has


class Mean(NamedTuple):
    """A sum over what a shard has of each group of images, and how many there were; [groups] each.

    Where groups do not matter there is but one of each shard.
    """

    sum: Float[Array, "g *n"]
    count: Float[Array, "g"]


class Layout(NamedTuple):
    """How images and their groups (`loss.group_size`) lie on the devices."""

    sizes: tuple[int, int, int]  # of the mesh axes group, ring and gather
    everywhere: Ring  # over all images
    in_group: Ring  # over the images of a group
    groups_per_shard: int  # more than 1 where a device holds whole groups
    shards_per_group: int  # more than 1 where a group spans devices


def image_caption_loss(
    image_embed: Float[Array, "b D"],
    text_embed: Float[Array, "b D"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    caption_id: Int[Array, "b"],
    *,
    contrast: str,
    tile: int,
    ring: Ring,
) -> tuple[Float[Array, "b"], Bool[Array, "b"]]:
    """L_ic of each image and its caption, against all captions and images of the ring.

    The mean of both directions for "softmax" (CLIP); for "sigmoid", in which a pair is a pair, one of them.

    Args:
      caption_id: equal ones are not each other's negatives.

    Returns:
      (loss, whether the image is nearest to its own caption).
    """
    own = logit_scale * jnp.sum(image_embed * text_embed, axis=-1) + logit_bias
    ways = jnp.stack([image_embed, text_embed])  # the rows; the columns are the others
    if contrast == "sigmoid":
        ways = ways[:1]
    real = jnp.ones(caption_id.shape, bool)
    negatives = functools.partial(streaming.negatives, contrast, tile, ring)
    # Both ways at once, so that their columns travel together.
    negative = jax.vmap(negatives, in_axes=(0, None, Columns(0, None, None), None, None))(
        ways,
        caption_id,
        Columns(jnp.stack([text_embed, image_embed])[: len(ways)], caption_id, real),
        logit_scale,
        logit_bias,
    )
    loss = streaming.loss_of_rows(contrast, own, negative.cost).mean(0)
    return loss, _is_nearest(own, negative.highest[0], logit_scale)


def region_description_loss(
    region_embed: Float[Array, "b Q D"],
    region_text_embed: Float[Array, "b R D"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    description_id: Int[Array, "b R"],
    description_mask: Bool[Array, "b R"],
    label_slot: Int[Array, "b R"],
    match: matching.Match,
    *,
    contrast: str,
    tile: int,
    ring: Ring,
) -> tuple[Float[Array, "b R"], Bool[Array, "b R"]]:
    """L_rd of each region: its matched query against the descriptions of the ring; 0 where none is matched.

    Args:
      description_id: equal ones are not each other's negatives.
      description_mask: which descriptions take part.
      label_slot: for each region, the place of its description in its image (its own place, but for the
        reference's quirk 1).

    Returns:
      (loss, whether a query is matched and nearest to the region's own description).
    """
    b, slots = description_id.shape
    if slots == 0:  # a run without regions, such as the CLIP baseline
        return jnp.zeros((b, 0)), jnp.zeros((b, 0), bool)
    pred = jnp.take_along_axis(region_embed, match.query_index[..., None], axis=1)  # [b, R, D]
    label = jnp.take_along_axis(region_text_embed, label_slot[..., None], axis=1)  # [b, R, D]
    own = logit_scale * jnp.sum(pred * label, axis=-1) + logit_bias  # [b, R]
    label_id = jnp.take_along_axis(description_id, label_slot, axis=1)
    flat = lambda x: x.reshape(b * slots, *x.shape[2:])  # noqa: E731
    columns = Columns(flat(region_text_embed), flat(description_id), flat(description_mask))
    negative = streaming.negatives(
        contrast, tile, ring, flat(pred), flat(label_id), columns, logit_scale, logit_bias
    )
    cost, highest = (x.reshape(b, slots) for x in negative)
    loss = streaming.loss_of_rows(contrast, own, cost)
    return jnp.where(match.valid, loss, 0), match.valid & _is_nearest(own, highest, logit_scale)


def _is_nearest(own_logit, highest_negative, logit_scale):
    """Whether the own logit beats every negative; a tie does not count, nor what rounding makes of it."""
    return own_logit - highest_negative > TIE * logit_scale


def box_loss(
    pred_boxes_cxcywh: Float[Array, "b Q 4"],
    target_boxes_cxcywh: Float[Array, "b R 4"],
    match: matching.Match,
    *,
    iou_epsilon: float,
) -> tuple[Float[Array, "b R"], Float[Array, "b R"]]:
    """L_box of each region and its matched query, L1 + (1 - GIoU); 0 where none is matched.

    Returns:
      (loss, plain IoU).
    """
    pred = jnp.take_along_axis(pred_boxes_cxcywh, match.query_index[..., None], axis=1)  # [b, R, 4]
    l1 = jnp.abs(pred - target_boxes_cxcywh).sum(-1)
    pred_xyxy, target_xyxy = map(boxes.cxcywh_to_xyxy, (pred, target_boxes_cxcywh))
    overlap = boxes.giou(pred_xyxy, target_xyxy, epsilon=iou_epsilon)
    iou, _ = boxes.iou_and_union(pred_xyxy, target_xyxy)
    at_matches = lambda x: jnp.where(match.valid, x, 0)  # noqa: E731
    return at_matches(l1 + 1 - overlap), jax.lax.stop_gradient(at_matches(iou))


def _losses_of_shard(
    outputs: schema.Outputs, batch: schema.Batch, *, config: Loss, layout: Layout
) -> dict[str, Mean]:
    """What the images of one device add to each loss."""
    images = batch.caption_id.shape[0]
    groups = layout.groups_per_shard
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
    caption_id, description_id = batch.caption_id, batch.description_id
    if not config.mask_duplicates:  # then every text is a text of its own
        caption_id = _own_ids(caption_id.shape, layout.everywhere)
        description_id = _own_ids(description_id.shape, layout.everywhere)

    cosine = None
    if config.match_description:
        cosine = streaming.similarity(outputs.region_embed, outputs.region_text_embed)  # [b, Q, R]

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
            match = matching.match(cost, box_mask)
        return *box_loss(pred, target, match, iou_epsilon=config.iou_epsilon), match

    box, iou, match = matched_box_loss(outputs.pred_boxes_cxcywh[-1])
    if config.deep_supervision:
        for pred in outputs.pred_boxes_cxcywh[:-1]:
            box += matched_box_loss(pred)[0]

    contrast = dict(contrast=config.contrast, tile=config.tile)
    with jax.named_scope("image_caption"):
        image_caption, image_right = image_caption_loss(
            outputs.image_embed,
            outputs.text_embed,
            outputs.logit_scale,
            outputs.logit_bias,
            caption_id,
            ring=layout.everywhere,
            **contrast,
        )

    def per_group(x):  # [b, ...] -> [groups, images of the group, ...]
        return x.reshape(groups, images // groups, *x.shape[1:])

    with jax.named_scope("region_description"):
        of_group = functools.partial(region_description_loss, ring=layout.in_group, **contrast)
        region_description, region_right = jax.vmap(
            of_group, in_axes=(0, 0, None, None, 0, 0, 0, 0)
        )(
            per_group(outputs.region_embed),
            per_group(outputs.region_text_embed),
            outputs.logit_scale,
            outputs.logit_bias,
            per_group(description_id),
            per_group(description_mask),
            per_group(label_slot),
            jax.tree.map(per_group, match),
        )
    total = lambda x: per_group(x).sum((1, 2)).astype(jnp.float32)  # noqa: E731
    matched = total(match.valid)
    share_of_matched = lambda x: Mean(x[None].astype(jnp.float32), matched.sum()[None])  # noqa: E731
    queries = jnp.arange(outputs.region_embed.shape[1])
    uses = match.valid[..., None] & (match.query_index[..., None] == queries)  # [b, R, Q]
    return {
        "image_caption": Mean(image_caption.sum()[None], jnp.float32(images)[None]),
        "box": Mean(total(box), total(box_mask)),
        "region_description": Mean(region_description.sum((1, 2)), matched),
        "matched_iou": share_of_matched(iou.sum()),
        "matched_iou50": share_of_matched((iou >= boxes.FOUND_IOU).sum()),
        "image_caption_accuracy": Mean(
            image_right.sum()[None].astype(jnp.float32), jnp.float32(images)[None]
        ),
        "region_description_accuracy": share_of_matched(region_right.sum()),
        "query_share": share_of_matched(uses.sum((0, 1))),
    }


def _own_ids(shape: tuple[int, ...], ring: Ring):
    """A number for each entry that no other entry of the ring has."""
    ids = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
    axes = ring.axes + ((ring.gather,) if ring.gather else ())
    return ids + math.prod(shape) * jax.lax.axis_index(axes) if axes else ids


def layout(images: int, config: Loss, shards: int) -> Layout:
    """How `images` lie on so many shards. A group is cut over shards, or a shard holds whole groups.

    Raises:
      UserError: groups cross the shards' edges, or `loss.gather` shards do not divide those of a group.
    """
    size, shard = config.group_size or images, images // shards
    faults = []
    if max(size, shard) % min(size, shard):
        whole = [n for n in config_lib.divisors(images) if n % shard == 0 or shard % n == 0]
        faults.append(
            f"loss.group_size: got {size}, expected a divisor or a multiple of the {shard} images that a"
            f" device has (batch_size {images} over data x fsdp = {shards}); set"
            f" {config_lib.flags_of('loss.group_size', whole, size)}"
        )
    per_group = max(1, size // shard)
    neighbours = per_group if per_group > 1 else shards
    if neighbours % config.gather:
        faults.append(
            f"loss.gather: got {config.gather}, expected a divisor of the {neighbours} devices that share"
            " negatives; set"
            f" {config_lib.flags_of('loss.gather', config_lib.divisors(neighbours), config.gather)}"
        )
    if faults:
        raise errors.UserError("\n".join(faults))
    gather = "gather" if config.gather > 1 else None
    ring = max(1, per_group // config.gather)
    sizes = shards // (ring * config.gather), ring, config.gather
    return Layout(
        sizes,
        everywhere=Ring(("group", "ring"), sizes[0] * ring, gather) if shards > 1 else Ring(),
        in_group=Ring(("ring",), ring, gather) if per_group > 1 else Ring(),
        groups_per_shard=max(1, shard // size),
        shards_per_group=per_group,
    )


def total_loss(
    outputs: schema.Outputs,
    batch: schema.Batch,
    config: Loss,
    *,
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = (),
) -> Losses:
    """All of GRAIN's losses on the outputs for a global batch.

    Args:
      outputs: of the model.
      batch: what the outputs are for.
      config: weights and switches.
      mesh: its devices share the work, or None for one device.
      batch_axes: the mesh axes, its first ones, that the leading axes of batch and outputs are cut over.

    Raises:
      UserError: `loss.group_size` or `loss.gather` does not fit the mesh.
    """
    shards = math.prod(mesh.shape[axis] for axis in batch_axes)
    lies = layout(batch.caption_id.shape[0], config, shards)
    # What the losses do not read stays outside: images and tokens are large.
    batch = batch._replace(image=None, text_tokens=None, text_positions=None, text_segments=None)
    batch = batch._replace(caption_at=None, description_at=None)
    batch = batch._replace(texts_dropped=None, text_counts=None)
    of_shard = functools.partial(_losses_of_shard, config=config, layout=lies)
    if mesh is None:
        means = of_shard(outputs, batch)
    else:
        axes = ("group", "ring", "gather")
        loss_mesh = Mesh(mesh.devices.reshape(*lies.sizes, -1), (*axes, "rest"))
        cut, whole = PartitionSpec(axes), PartitionSpec()
        specs = schema.Outputs(
            cut, cut, cut, cut, PartitionSpec(None, axes), logit_scale=whole, logit_bias=whole
        )
        means = jax.shard_map(
            of_shard, mesh=loss_mesh, in_specs=(specs, cut), out_specs=cut, check_vma=False
        )(outputs, batch)

    def mean(name: str, per_group: bool = False):
        total, count = means[name]
        if per_group:
            total, count = (x.reshape(-1, lies.shards_per_group).sum(1) for x in (total, count))
        else:
            total, count = total.sum(0), count.sum()
        means_of_groups = jnp.where(count > 0, total / jnp.maximum(count, 1), 0.0)
        return means_of_groups.mean() if per_group else means_of_groups

    image_caption = mean("image_caption")
    region_description = mean("region_description", per_group=True)
    box = mean("box", per_group=True)
    total = (
        config.image_caption * image_caption
        + config.box * box
        + config.region_description * region_description
    )
    measures = {name: mean(name) for name in Losses._fields[4:]}
    return Losses(total, image_caption, region_description, box, **measures)
