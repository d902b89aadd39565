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

import typing
from typing import Annotated, Any, NamedTuple

import numpy as np

Array = Any  # a numpy or a jax array


class Field(NamedTuple):
    """How a field of `Batch` or `Outputs` lies over images, and who reads it."""

    image_axis: int | None = 0  # the axis of the images; None: the same for all images
    for_losses: bool = True  # False: only the model or the trainer reads it


Images = Annotated[Array, Field()]
LayersOfImages = Annotated[Array, Field(1)]
Shared = Annotated[Array, Field(None)]
# A tree, each array with an axis of its own (losses.local.axes_of).
OfTerms = Annotated[Any, Field()]
ModelInput = Annotated[Array, Field(for_losses=False)]

# Pixels are normalised on the device with ImageNet's statistics (docs/method.md, Annotations).
IMAGE_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
IMAGE_STD = np.array((0.229, 0.224, 0.225), np.float32)


class Batch(NamedTuple):
    """A process's part of a batch (numpy), or the global batch (jax, first axis sharded over the data axes).

    Texts are packed: `pack_group` consecutive images share `rows` rows of L positions. The row within the
    group and the position of the end token locate a text. Without packing a group is one image, and a row is
    one text.
    """

    image: ModelInput  # uint8 [B, H, W, 3]
    text_tokens: ModelInput  # int32 [G, rows, L], 0 = padding
    text_positions: ModelInput  # int32 [G, rows, L], restart at 0 for each text
    text_segments: ModelInput  # int32 [G, rows, L], 1.. within a row, 0 = padding
    caption_at: ModelInput  # int32 [B, C, 2] (row, end token), zeros if masked
    caption_id: Images  # int32 [B, C], same text same id
    caption_mask: Images  # bool [B, C]; False if the image has no such caption
    description_at: ModelInput  # int32 [B, R, 2] (row, end token), zeros if masked
    description_id: Images  # int32 [B, R], same text same id
    region_boxes_cxcywh: Images  # float32 [B, R, 4]
    region_mask: Images  # bool [B, R]
    # int32 [G], negatives and regions that did not fit into the rows of their group, and captions cut to fit
    texts_dropped: ModelInput
    # int32 [G, 2], captions, descriptions and negatives; those that were cut to L. None: not counted.
    text_counts: ModelInput = None
    # Texts that are nearly a region's description, and wrong. None: `input.negatives_per_region` is 0.
    negative_at: ModelInput = None  # int32 [B, R, H, 2] (row, end token), zeros if masked
    negative_mask: Images = None  # bool [B, R, H]; False if the region is not real


class TokenBoxes(NamedTuple):
    """What each patch says of the object that it shows (models/region_decoder.py:Pointer)."""

    boxes_cxcywh: Array  # float32 [B, P, 4], the box of the object
    logit: Array  # float32 [B, P], whether there is an object
    centre_xy: Array  # float32 [B, P, 2], of the patch itself


class Outputs(NamedTuple):
    """Outputs of the model for a batch; embeddings are float32 and of unit length."""

    image_embed: Images  # float32 [B, D], from the image query
    text_embed: Images  # float32 [B, C, D], the captions
    region_embed: Images  # float32 [B, Q, D]
    region_text_embed: Images  # float32 [B, R, D], the descriptions
    # float32 [T, B, Q, 4], of every decoder layer; the last one is the prediction
    pred_boxes_cxcywh: LayersOfImages
    logit_scale: Shared  # float32 [], the factor itself (the parameter is its logarithm)
    logit_bias: Shared  # float32 [], of contrastive loss type sigmoid; 0 in a model without
    # float32 [B, R, D], the annotated boxes by the box head; None in a model without.
    box_embed: Images = None
    # TokenBoxes; None in a model without pointer.
    token_boxes: Images = None
    # float32 [B, R, H, D], the negatives of the descriptions; None if the batch has none.
    negative_text_embed: Images = None
    # Name -> losses.local.LocalOutput, of the local loss terms; None in a run without.
    local: OfTerms = None
    # float32 [] each, for the losses of regions; None: they use `logit_scale` and `logit_bias`.
    region_logit_scale: Shared = None
    region_logit_bias: Shared = None

    @property
    def region_scale_and_bias(self) -> tuple[Array, Array]:
        """Scale and bias of the losses of regions."""
        if self.region_logit_scale is None:
            return self.logit_scale, self.logit_bias
        return self.region_logit_scale, self.region_logit_bias


class Features(NamedTuple):
    """What the model makes on the way to its Outputs; too large to be kept of a global batch."""

    tokens: Array  # [B, N, E] of the image tower, after the last norm; [B, E] of a pooled one
    text: Array  # [G, rows, L, E], of all positions, before the last norm; [G, rows, E] of a pooled tower


def fields(kind: type[Batch] | type[Outputs]) -> dict[str, Field]:
    """The declaration of each field, by name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


class Regions(NamedTuple):
    """Result of `encode_regions`: the boxes and embeddings of the region queries."""

    boxes_xyxy: Array  # float32 [B, Q, 4] in [0, 1]
    embed: Array  # float32 [B, Q, D], unit length
