"""The contract between the input pipeline, the model, the losses and the evaluators.

Axis letters, used in every shape comment of the project:

    B  images of the batch          H W  image height and width     P  image patches
    N  image tokens (P + 1)         L    text positions of a row      G  packing groups (B / pack_group)
    C  captions per image           R    target regions per image     Q  region queries
    D  joint embedding              E    tower width                  K  attention heads
    T  decoder layers               H    hard negatives per region

Boxes are normalised to [0, 1] everywhere inside `grain_jax` and carry their format in the name
(`*_cxcywh`, `*_xyxy`). Masks are positive: True means real. This module imports numpy only.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Array = Any  # a numpy or a jax array


# Pixels are normalised on the device with ImageNet's statistics (docs/method.md, Annotations).
IMAGE_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
IMAGE_STD = np.array((0.229, 0.224, 0.225), np.float32)


class Batch(NamedTuple):
    """A process's part of a batch (numpy), or the global batch (jax, first axis sharded over the data axes).

    Texts are packed: `pack_group` consecutive images share `rows` rows of L positions. The row within the
    group and the position of the end token locate a text. Without packing a group is one image, and a row is
    one text.
    """

    image: Array  # uint8 [B, H, W, 3]
    text_tokens: Array  # int32 [G, rows, L], 0 = padding
    text_positions: Array  # int32 [G, rows, L], restart at 0 for each text
    text_segments: Array  # int32 [G, rows, L], 1.. within a row, 0 = padding
    caption_at: Array  # int32 [B, C, 2] (row, end token), zeros if masked
    caption_id: Array  # int32 [B, C], same text same id
    caption_mask: Array  # bool [B, C]; False if the image has no such caption
    description_at: Array  # int32 [B, R, 2] (row, end token), zeros if masked
    description_id: Array  # int32 [B, R], same text same id
    region_boxes_cxcywh: Array  # float32 [B, R, 4]
    region_mask: Array  # bool [B, R]
    # int32 [G], negatives and regions that did not fit into the rows of their group, and captions cut to fit
    texts_dropped: Array
    # int32 [G, 2], captions, descriptions and negatives; those that were cut to L. None: not counted.
    text_counts: Array = None
    # Texts that are nearly a region's description, and wrong. None: `input.negatives_per_region` is 0.
    negative_at: Array = None  # int32 [B, R, H, 2] (row, end token), zeros if masked
    negative_mask: Array = None  # bool [B, R, H]; False if the region is not real

    def for_losses(self) -> "Batch":
        """What the losses read: ids, boxes and masks, without what is large."""
        unread = ("image", "text_tokens", "text_positions", "text_segments", "caption_at", "description_at")
        return self._replace(**dict.fromkeys((*unread, "texts_dropped", "text_counts", "negative_at")))


class TokenBoxes(NamedTuple):
    """What each patch says of the object that it shows (models/region_decoder.py:Pointer)."""

    boxes_cxcywh: Array  # float32 [B, P, 4], the box of the object
    logit: Array  # float32 [B, P], whether there is an object
    centre_xy: Array  # float32 [B, P, 2], of the patch itself


class Scales(NamedTuple):
    """The factors and biases of the logits, float32 [] each."""

    logit_scale: Array  # the factor itself (the parameter is its logarithm)
    logit_bias: Array  # of contrastive loss type sigmoid; 0 in a model without
    region_logit_scale: Array = None  # for the losses of regions; None: they use those above
    region_logit_bias: Array = None

    @property
    def of_regions(self) -> tuple[Array, Array]:
        """Scale and bias of the losses of regions."""
        return self[:2] if self.region_logit_scale is None else self[2:]


class Outputs(NamedTuple):
    """Outputs of the model for a batch; embeddings are float32 and of unit length.

    Images are the first axis of every array, except in `scales` and `statistics`.
    """

    image_embed: Array  # [B, D], from the image query
    text_embed: Array  # [B, C, D], the captions
    region_embed: Array  # [B, Q, D]
    region_text_embed: Array  # [B, R, D], the descriptions
    pred_boxes_cxcywh: Array  # float32 [B, T, Q, 4], of every decoder layer; the last one is the prediction
    scales: Scales  # the same for all images
    box_embed: Array = None  # [B, R, D], the annotated boxes by the box head; None in a model without
    token_boxes: TokenBoxes | None = None  # None in a model without pointer
    negative_text_embed: Array = None  # [B, R, H, D], the negatives of the descriptions; None without
    # Name -> losses.local.LocalOutput of the local loss terms, and their sums over the images; {} without.
    local: Mapping[str, Any] = {}
    statistics: Mapping[str, Any] = {}


class Features(NamedTuple):
    """What the model makes on the way to its Outputs; too large to be kept of a global batch."""

    tokens: Array  # [B, N, E] of the image tower, after the last norm; [B, E] of a pooled one
    text: Array  # [G, rows, L, E], of all positions, before the last norm; [G, rows, E] of a pooled tower


class Regions(NamedTuple):
    """Result of `encode_regions`: of the region queries, or with `model.boxes.proposals` of all P patches."""

    boxes_xyxy: Array  # float32 [B, Q, 4] in [0, 1]
    embed: Array  # float32 [B, Q, D], unit length
    # float32 [B, Q], what a region's score adds to its cosine: 0, or `object_weight` * log P(object)
    prior: Array
