"""Box arithmetic in [0, 1]; formats are in the names: cxcywh (centre, size) and xyxy (corners)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

# A box with at least this IoU counts as found, in training and in every evaluation. The scripts of RefCOCO
# (lichengunc/MAttNet, eval_dets_utils.py; djiajunustc/TransVG, eval_utils.py) and Flickr30k Entities
# (ashkamath/mdetr, flickr_eval.py) count 0.5 itself, too.
FOUND_IOU = 0.5


def cxcywh_to_xyxy(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """Centre and size to corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def xyxy_to_cxcywh(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """Corners to centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def area(boxes_xyxy: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Width times height; negative if one of them is."""
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    return size[..., 0] * size[..., 1]


def _divide(a, b):
    """a / b, and 0 (with gradient 0) where b is 0: padded boxes have no area."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def iou_and_union(a_xyxy, b_xyxy, *, epsilon: float = 0.0):
    """IoU and union area, elementwise over broadcast leading axes.

    Args:
      a_xyxy, b_xyxy: [..., 4].
      epsilon: added to the union in the IoU only (the reference: 1e-4, quirk 15).
    """
    low = jnp.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    high = jnp.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    overlap = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    union = area(a_xyxy) + area(b_xyxy) - overlap
    return _divide(overlap, union + epsilon), union


def giou(a_xyxy, b_xyxy, *, epsilon: float = 0.0):
    """Generalised IoU in [-1, 1] (Rezatofighi et al. 2019), elementwise over broadcast leading axes."""
    iou, union = iou_and_union(a_xyxy, b_xyxy, epsilon=epsilon)
    low = jnp.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    high = jnp.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    hull = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    return iou - _divide(hull - union, hull)
