"""The contrastive losses of images and regions with their texts (docs/method.md, Losses).

Rows and columns that lie on other devices are met in `streaming`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grain_jax.losses import streaming
from grain_jax.losses.ring import Ring
from grain_jax.losses.shard import GroupMean, Mean, Shard, TermOutput
from grain_jax.losses.streaming import Vectors

TIE = 1e-5  # cosines nearer than this are equal but for rounding


def image_caption(shard: Shard) -> TermOutput:
    """L_ic: each image and its caption, against all captions and images of the batch.

    The mean of both directions for "softmax" (CLIP). "sigmoid" is symmetric, so one direction suffices.
    Several captions per image are all its positives; the mean is then over captions. An image without a
    caption is a negative of the others' captions, and nothing else. Measures `image_caption_accuracy`: the
    share of images nearest to their own caption, or with several captions the share of captions whose nearest
    image has them.
    """
    texts, ids = shard.outputs.text_embed, shard.targets.caption_id
    return _images_and_texts("image_caption_accuracy", shard, texts, ids, shard.batch.caption_mask)


def plain_image_text(image, texts, ids, scale):
    """L_ic and L_id on one device, with the whole matrix: image [B, D], texts [B, S, D], their ids [B, S]."""
    z = scale * jnp.einsum("id,jkd->ijk", image, texts, precision="highest")
    is_own = (ids[:, None, None] == ids[:, :, None]).any(-1)  # [i, j, k]: whether text jk is one of image i's
    negative = jnp.where(is_own, -jnp.inf, z)
    own_logits = jnp.einsum("iik->ik", z)
    of_text, of_image = (jax.nn.logsumexp(negative, axis) for axis in (0, (1, 2)))
    to_image, to_text = jnp.logaddexp(own_logits, of_text), jnp.logaddexp(own_logits, of_image[:, None])
    return jnp.mean(to_image + to_text - 2 * own_logits) / 2


def image_description(shard: Shard) -> TermOutput:
    """L_id: each image and each of its descriptions, against all that are not each other's in the batch.

    Measures `image_description_accuracy`, the share of descriptions whose nearest image has them.
    """
    texts, real = shard.outputs.region_text_embed, shard.batch.region_mask
    if real.shape[1] == 0:
        return TermOutput(Mean(jnp.zeros(()), jnp.zeros(())), {})
    ids, name = shard.targets.description_id, "image_description_accuracy"
    return _images_and_texts(name, shard, texts, ids, real)


def _images_and_texts(accuracy: str, shard: Shard, texts, ids, real) -> TermOutput:
    """The mean loss of all texts, and under that name how many are right.

    A text is compared with the images that do not have it, an image with the texts that it does not have; the
    mean of both for "softmax". The idea of many texts as positives of one image is DreamLIP's (Zheng et al.
    2024); here equal texts of two images are positives of both.

    Args: texts [b, S, D], their ids [b, S], and where they are real, bool [b, S].
    """
    image, one_each = shard.outputs.image_embed, texts.shape[1] == 1
    scale, bias = shard.outputs.scales[:2]
    own_logits = scale * jnp.sum(image[:, None] * texts, axis=-1) + bias
    rows = Vectors(image, jnp.where(real, ids, streaming.NO_ID), jnp.ones(len(image), bool))
    columns = _flat(texts, ids, real)
    if one_each:
        # An image without a text then has no loss for "softmax", and the loss of its negatives for "sigmoid".
        own_logits = jnp.where(real, own_logits, -streaming.MASKED)
    else:
        rows, columns = columns, rows
    loss, right = _both_ways(shard, shard.layout.everywhere, rows, columns, own_logits, scale, bias)
    output = _mean_over_texts(accuracy, loss, right, real)
    if one_each:
        output = output._replace(loss=Mean(loss.sum(), output.loss.count))
    return output


def _flat(embed, ids, real) -> Vectors:
    """Embeddings [b, S, D], their ids and where they are real, [b, S] -> b S vectors."""
    return Vectors(embed.reshape(-1, embed.shape[-1]), ids.reshape(-1, 1), real.reshape(-1))


def _both_ways(shard: Shard, ring: Ring, rows: Vectors, columns: Vectors, own_logits, scale, bias):
    """(loss of each pair, whether its row is nearest to its column), shaped as their logits [b, S].

    There is a row for each pair, and a column for each pair or for each of the b images. The mean of both
    directions for "softmax"; "sigmoid" is symmetric, so one direction suffices.
    """
    contrast, tile = shard.config.contrast, shard.config.tile
    both = contrast == "softmax"
    costs: Any = streaming.negatives(contrast, both, tile, ring, rows, columns, scale, bias)
    of_rows, of_columns = costs
    loss = streaming.loss_of_rows(contrast, own_logits, of_rows.cost.reshape(own_logits.shape))
    if both:
        back = streaming.loss_of_rows(contrast, own_logits, of_columns.cost.reshape(len(own_logits), -1))
        loss = (loss + back) / 2
    return loss, _is_nearest(own_logits, of_rows.highest.reshape(own_logits.shape), scale)


def _of_groups(shard: Shard, function: Callable, *arrays):
    """`function` of the arrays of each group of the device, with a leading axis of the groups."""
    return jax.vmap(function)(*(jax.tree.map(shard.layout.per_group, x) for x in arrays))


def _mean_over_texts(accuracy: str, loss, right, real) -> TermOutput:
    """The mean loss of the real texts, and under that name the share of them that are right."""
    count = real.sum().astype(jnp.float32)
    return TermOutput(
        Mean(jnp.where(real, loss, 0).sum(), count),
        {accuracy: Mean((right & real).sum().astype(jnp.float32), count)},
    )


def region_description(shard: Shard) -> TermOutput:
    """L_rd: each matched query against the descriptions of its group; a mean over its matched regions.

    Measures `region_description_accuracy`, the share of matched regions nearest to their own description.
    """
    outputs, targets, per_group = shard.outputs, shard.targets, shard.layout.per_group
    loss, right = _of_groups(
        shard,
        functools.partial(_region_description_of_group, shard),
        outputs.region_embed,
        outputs.region_text_embed,
        targets.description_id,
        targets.description_mask,
        targets.label_slot,
        shard.match,
    )
    counts = per_group(jnp.where(shard.match.valid, shard.agreement, 0))
    matched = per_group(shard.match.valid).sum((1, 2)).astype(jnp.float32)
    measures = {}
    if right.size and shard.outputs.region_embed.shape[1]:  # a run with regions and queries
        accuracy = Mean(right.sum().astype(jnp.float32), matched.sum())
        measures["region_description_accuracy"] = accuracy
    return TermOutput(GroupMean((counts * loss).sum((1, 2)), counts.sum((1, 2))), measures)


def plain_region_description(regions, descriptions, ids, scale):
    """L_rd on one device, with the whole matrix: row j of both [n, D] is region j, whose text is ids[j]."""
    z = scale * streaming.similarity(regions, descriptions)
    no_negative = (ids[:, None] == ids) & ~jnp.eye(len(ids), dtype=bool)
    return jnp.mean(jax.nn.logsumexp(jnp.where(no_negative, -jnp.inf, z), axis=1) - jnp.diag(z))


def _region_description_of_group(shard, region_embed, region_text_embed, id_, mask, label_slot, match):
    """(loss of each region, 0 where none is matched; whether its own description is nearest), [b, R] each."""
    if 0 in (id_.shape[1], region_embed.shape[1]):  # no regions, or no queries
        return jnp.zeros(id_.shape), jnp.zeros(id_.shape, bool)
    config, (scale, bias) = shard.config, shard.outputs.scales.of_regions
    pred = jnp.take_along_axis(region_embed, match.query_index[..., None], axis=1)  # [b, R, D]
    label = jnp.take_along_axis(region_text_embed, label_slot[..., None], axis=1)  # [b, R, D]
    own_logits = scale * jnp.sum(pred * label, axis=-1) + bias  # [b, R]
    label_id = jnp.take_along_axis(id_, label_slot, axis=1)
    rows = _flat(pred, label_id, jnp.ones_like(mask))
    columns = _flat(region_text_embed, id_, mask)
    costs: Any = streaming.negatives(
        config.contrast, False, config.tile, shard.layout.in_group, rows, columns, scale, bias
    )
    negative = costs[0]
    cost, highest = (x.reshape(id_.shape) for x in negative)
    loss = streaming.loss_of_rows(config.contrast, own_logits, cost)
    return jnp.where(match.valid, loss, 0), match.valid & _is_nearest(own_logits, highest, scale)


def plain_box_description(boxes, descriptions, ids, scale):
    """L_bd on one device: L_rd of the box embeddings, and with boxes and descriptions exchanged."""
    both = (boxes, descriptions), (descriptions, boxes)
    return sum(plain_region_description(*pair, ids, scale) for pair in both) / 2


def box_description(shard: Shard) -> TermOutput:
    """L_bd: each annotated box and its description, against the others of its group; a mean over its boxes.

    The box head embeds the boxes, so no query need have found one. A box without an embedding
    (`Shard.embedded`) is left out; its description stays a negative of the others. The mean of both
    directions for "softmax". "sigmoid" is symmetric, so one direction suffices. Measures
    `box_description_accuracy`, the share of boxes nearest to their own description.
    """
    outputs, targets = shard.outputs, shard.targets
    scale, bias = outputs.scales.of_regions

    def of_group(boxes, texts, id_, real, described):
        own_logits = scale * jnp.sum(boxes * texts, axis=-1) + bias  # [b, R]
        rows, columns = _flat(boxes, id_, real), _flat(texts, id_, described)
        loss, right = _both_ways(shard, shard.layout.in_group, rows, columns, own_logits, scale, bias)
        return jnp.where(real, loss, 0), real & right

    arrays = outputs.box_embed, outputs.region_text_embed, targets.description_id
    loss, right = _of_groups(shard, of_group, *arrays, shard.embedded, targets.box_mask)
    counts = shard.layout.per_group(jnp.where(shard.embedded, shard.agreement, 0))
    accuracy = Mean(right.sum().astype(jnp.float32), shard.embedded.sum().astype(jnp.float32))
    mean = GroupMean((counts * loss).sum((1, 2)), counts.sum((1, 2)))
    return TermOutput(mean, {"box_description_accuracy": accuracy})


def hard_negative(shard: Shard) -> TermOutput:
    """L_hard: each matched query, and each embedded box, against its description and its hard negatives.

    A mean over the regions that have a negative, of all images, once for each embedding that they have.
    Measures the share of them whose description beats all of its negatives: `hard_negative_accuracy` by the
    queries, `hard_negative_box_accuracy` by the boxes.
    """
    outputs, match, targets = shard.outputs, shard.match, shard.targets
    slot, zero = targets.label_slot, jnp.zeros(())
    total, measures = Mean(zero, zero), {}
    if outputs.negative_text_embed is None:
        return TermOutput(total, measures)
    of_label = lambda x: jnp.take_along_axis(x, slot.reshape(*slot.shape, *(1,) * (x.ndim - 2)), axis=1)
    text, negatives = of_label(outputs.region_text_embed), of_label(outputs.negative_text_embed)
    negative_mask = of_label(shard.batch.negative_mask)
    embeds = {}  # [b, R, D], and which regions have one
    if outputs.region_embed.shape[1]:
        query = jnp.take_along_axis(outputs.region_embed, match.query_index[..., None], axis=1)
        embeds["hard_negative_accuracy"] = query, match.valid
    if outputs.box_embed is not None:
        embeds["hard_negative_box_accuracy"] = outputs.box_embed, shard.embedded
    for name, (embed, valid) in embeds.items():
        loss, right = _among_own_negatives(shard, embed, text, negatives, negative_mask)
        real = valid & negative_mask.any(-1)
        mean, accuracy = _mean_over_texts(name, loss, right, real)
        total = Mean(total.sum + mean.sum, total.count + mean.count)
        measures |= accuracy
    return TermOutput(total, measures)


def _among_own_negatives(shard: Shard, embed, text, negatives, negative_mask):
    """(loss of each region, whether its text beats its negatives), [b, R] each.

    Args:
      shard: scale, bias and type of the loss.
      embed: [b, R, D], what is compared with the texts of each region.
      text: [b, R, D], the right text.
      negatives: [b, R, H, D].
      negative_mask: bool [b, R, H].
    """
    contrast, (scale, bias) = shard.config.contrast, shard.outputs.scales.of_regions
    # Sums of products, not matrix products: a text and the same text as a negative then round alike.
    own_logits = scale * jnp.sum(embed * text, axis=-1) + bias
    logits = scale * jnp.sum(embed[:, :, None] * negatives, axis=-1) + bias
    logits = jnp.where(negative_mask, logits, streaming.MASKED)  # [b, R, H]
    cost = jax.nn.softplus(logits).sum(-1)
    if contrast == "softmax":
        cost = jax.nn.logsumexp(logits, axis=-1)
    loss = streaming.loss_of_rows(contrast, own_logits, cost)
    return loss, _is_nearest(own_logits, logits.max(-1), scale)


def _is_nearest(own_logit, highest_negative, logit_scale):
    """Whether the own logit beats every negative by more than rounding; a tie does not count."""
    return own_logit - highest_negative > TIE * logit_scale
