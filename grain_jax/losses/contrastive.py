"""The contrastive losses of images and regions with their texts (docs/method.md, Losses).

`against_texts` finds the negatives of all of them, in one pass over the captions and one over the
descriptions of all devices.
"""

import jax
import jax.numpy as jnp

from grain_jax.losses import streaming
from grain_jax.losses.shard import GroupMean, Mean, Shard, TermOutput
from grain_jax.losses.streaming import Columns, Pair, Rows

TIE = 1e-5  # cosines nearer than this are equal but for rounding


def image_caption(shard: Shard) -> TermOutput:
    """L_ic: each image and its caption, against all captions and images of the batch.

    The mean of both directions for "softmax" (CLIP). "sigmoid" is symmetric, so one direction suffices.
    Several captions per image are all its positives; the mean is then over captions. An image without a
    caption is a negative of the others' captions, and nothing else. Measures `image_caption_accuracy`: the
    share of images nearest to their own caption, or with several captions the share of captions whose nearest
    image has them.
    """
    texts, real = shard.outputs.text_embed, shard.batch.caption_mask
    return _images_and_texts("image_caption", shard, texts, real)


def image_description(shard: Shard) -> TermOutput:
    """L_id: each image and each of its descriptions, against all that are not each other's in the batch.

    Measures `image_description_accuracy`, the share of descriptions whose nearest image has them.
    """
    texts, real = shard.outputs.region_text_embed, shard.batch.region_mask
    if real.shape[1] == 0:
        return TermOutput(Mean(jnp.zeros(()), jnp.zeros(())), {})
    return _images_and_texts("image_description", shard, texts, real)


def _images_and_texts(name: str, shard: Shard, texts, real) -> TermOutput:
    """The mean loss of all texts, and as `NAME_accuracy` how many are right.

    A text is compared with the images that do not have it, an image with the texts that it does not have; the
    mean of both for "softmax". The idea of many texts as positives of one image is DreamLIP's (Zheng et al.
    2024); here equal texts of two images are positives of both.

    Args: texts [b, S, D], and where they are real, bool [b, S].
    """
    one_each = texts.shape[1] == 1
    scale, bias = shard.outputs.scales[:2]
    own_logits = scale * jnp.sum(shard.outputs.image_embed[:, None] * texts, axis=-1) + bias  # [b, S]
    of_images, of_texts = shard.negatives[name]
    if one_each:
        # An image without a text then has no loss for "softmax", and the loss of its negatives for "sigmoid".
        own_logits = jnp.where(real, own_logits, -streaming.MASKED)
        first, second = of_images, of_texts
    else:
        first, second = of_texts, of_images
    loss, right = _both_ways(shard, own_logits, first, second, scale)
    output = _mean_over_texts(f"{name}_accuracy", loss, right, real)
    if one_each:
        output = output._replace(loss=Mean(loss.sum(), output.loss.count))
    return output


def _both_ways(shard: Shard, own_logits, first, second, scale):
    """(loss of each pair, whether its row is nearest to its column), shaped as their logits [b, S].

    The mean of both directions for "softmax"; "sigmoid" is symmetric, so the first direction suffices.

    Args:
      shard: its config names the loss.
      own_logits: [b, S], of the pairs.
      first: the negatives of one side of each pair [b S].
      second: the negatives of the other side, [b S], or [b] if it is the images.
      scale: of the logits.
    """
    contrast, images = shard.config.contrast, len(own_logits)
    loss = streaming.loss_of_rows(contrast, own_logits, first.cost.reshape(own_logits.shape))
    if contrast == "softmax":
        back = streaming.loss_of_rows(contrast, own_logits, second.cost.reshape(images, -1))
        loss = (loss + back) / 2
    return loss, _is_nearest(own_logits, first.highest.reshape(own_logits.shape), scale)


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
    outputs, valid = shard.outputs, shard.match.valid
    if 0 in (valid.shape[1], outputs.region_embed.shape[1]):  # no regions, or no queries
        none = jnp.zeros(shard.layout.groups_per_shard)
        return TermOutput(GroupMean(none, none), {})
    scale, bias = outputs.scales.of_regions
    label = _of_slots(shard, outputs.region_text_embed)
    own_logits = scale * jnp.sum(_matched(shard) * label, axis=-1) + bias  # [b, R]
    negative, _ = shard.negatives["region_description"]
    cost, highest = (x.reshape(own_logits.shape) for x in negative)
    loss = streaming.loss_of_rows(shard.config.contrast, own_logits, cost)
    return _mean_over_groups(
        "region_description_accuracy", shard, loss, _is_nearest(own_logits, highest, scale), valid
    )


def _matched(shard: Shard):
    """The embedding of the query that each region is matched to, [b, R, D]."""
    return jnp.take_along_axis(shard.outputs.region_embed, shard.match.query_index[..., None], axis=1)


def _of_slots(shard: Shard, x):
    """What the description of each region has: [b, R, ...] by `Targets.label_slot`."""
    slot = shard.targets.label_slot
    return jnp.take_along_axis(x, slot.reshape(*slot.shape, *(1,) * (x.ndim - 2)), axis=1)


def _mean_over_groups(accuracy: str, shard: Shard, loss, right, real) -> TermOutput:
    """The mean over groups of the loss of real regions [b, R], each as much as `Shard.agreement` says."""
    per_group = shard.layout.per_group
    counts = per_group(jnp.where(real, shard.agreement, 0))
    loss = per_group(jnp.where(real, loss, 0))
    share = Mean((right & real).sum().astype(jnp.float32), real.sum().astype(jnp.float32))
    return TermOutput(GroupMean((counts * loss).sum((1, 2)), counts.sum((1, 2))), {accuracy: share})


def box_description(shard: Shard) -> TermOutput:
    """L_bd: each annotated box and its description, against the others of its group; a mean over its boxes.

    The box head embeds the boxes, so no query need have found one. A box without an embedding
    (`Shard.embedded`) is left out; its description stays a negative of the others. The mean of both
    directions for "softmax". "sigmoid" is symmetric, so one direction suffices. Measures
    `box_description_accuracy`, the share of boxes nearest to their own description.
    """
    outputs, (scale, bias) = shard.outputs, shard.outputs.scales.of_regions
    own_logits = scale * jnp.sum(outputs.box_embed * outputs.region_text_embed, axis=-1) + bias  # [b, R]
    loss, right = _both_ways(shard, own_logits, *shard.negatives["box_description"], scale)
    return _mean_over_groups("box_description_accuracy", shard, loss, right, shard.embedded)


def against_texts(shard: Shard, names: set[str]) -> dict[str, Pair]:
    """The negatives of the losses of these names: of rows [b] or [b R], and of the texts of this device.

    Where all images are one group, images, queries and boxes meet the descriptions in the same pass.
    """
    layout, everywhere = shard.layout, shard.layout.everywhere
    captions = {name: _images(shard, name) for name in names & {"image_caption"}}
    descriptions = {name: _images(shard, name) for name in names & {"image_description"}}
    of_regions = {name: rows for name, rows in _regions(shard).items() if name in names}
    if layout.in_group == everywhere and layout.groups_per_shard == 1:
        descriptions, of_regions = descriptions | of_regions, {}
    pairs = _negatives(shard, captions, shard.captions, everywhere)
    pairs |= _negatives(shard, descriptions, shard.descriptions, everywhere)
    if of_regions:
        pairs |= _in_groups(shard, of_regions)
    return pairs


def _images(shard: Shard, name: str) -> Rows:
    """The images as rows against captions or descriptions."""
    texts, ids, real = shard.outputs.text_embed, shard.targets.caption_id, shard.batch.caption_mask
    if name == "image_description":
        texts, ids, real = (
            shard.outputs.region_text_embed,
            shard.targets.description_id,
            shard.batch.region_mask,
        )
    return Rows(
        shard.outputs.image_embed,
        jnp.where(real, ids, streaming.NO_ID),
        jnp.ones(len(ids), bool),
        *shard.outputs.scales[:2],
        both=shard.config.contrast == "softmax" or texts.shape[1] > 1,
    )


def _regions(shard: Shard) -> dict[str, Rows]:
    """Matched queries and annotated boxes as rows, b R of them, against the descriptions of their group."""
    outputs, targets = shard.outputs, shard.targets
    regions = {}
    if outputs.region_embed.shape[1]:
        every = jnp.ones(targets.box_mask.shape, bool)
        ids = _of_slots(shard, targets.description_id)
        regions["region_description"] = _matched(shard), ids, every, False
    if outputs.box_embed is not None:
        both = shard.config.contrast == "softmax"
        regions["box_description"] = outputs.box_embed, targets.description_id, shard.embedded, both
    return {
        name: Rows(
            embed.reshape(-1, embed.shape[-1]),
            ids.reshape(-1, 1),
            real.reshape(-1),
            *outputs.scales.of_regions,
            mask=1,
            both=both,
        )
        for name, (embed, ids, real, both) in regions.items()
        if ids.size
    }


def _negatives(
    shard: Shard, rows: dict[str, Rows], columns: Columns, axes: tuple[str, ...]
) -> dict[str, Pair]:
    """`streaming.negatives` by name."""
    if not rows or not len(columns.embed):
        return {}
    tile, precision = shard.config.tile, shard.layout.precision
    pairs = streaming.negatives(
        shard.config.contrast, [*rows.values()], columns, tile=tile, axes=axes, precision=precision
    )
    return dict(zip(rows, pairs))


def _in_groups(shard: Shard, rows: dict[str, Rows]) -> dict[str, Pair]:
    """The negatives of the rows of each group among the descriptions of the group."""
    layout = shard.layout
    arrays = {name: [layout.per_group(a) for a in (x.embed, x.ids, x.real)] for name, x in rows.items()}

    def of_group(arrays, columns):
        of_rows = {
            name: rows[name]._replace(embed=embed, ids=ids, real=real)
            for name, (embed, ids, real) in arrays.items()
        }
        return _negatives(shard, of_rows, columns, layout.in_group)

    pairs = jax.vmap(of_group)(arrays, shard.group_descriptions)
    return jax.tree.map(lambda x: x.reshape(-1), pairs)


def hard_negative(shard: Shard) -> TermOutput:
    """L_hard: each matched query, and each embedded box, against its description and its hard negatives.

    A mean over the regions that have a negative, of all images, once for each embedding that they have.
    Measures the share of them whose description beats all of its negatives: `hard_negative_accuracy` by the
    queries, `hard_negative_box_accuracy` by the boxes.
    """
    outputs, match, zero = shard.outputs, shard.match, jnp.zeros(())
    total, measures = Mean(zero, zero), {}
    if outputs.negative_text_embed is None:
        return TermOutput(total, measures)
    text, negatives, negative_mask = (
        _of_slots(shard, x)
        for x in (outputs.region_text_embed, outputs.negative_text_embed, shard.batch.negative_mask)
    )
    embeds = {}  # [b, R, D], and which regions have one
    if outputs.region_embed.shape[1]:
        embeds["hard_negative_accuracy"] = _matched(shard), match.valid
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
