"""Attention and losses in their plain forms, in the type of their arrays: in float64, the oracle of a chip.

Each is the whole matrix of an equation of docs/method.md, without tiles, meshes or masks of padding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.core import boxes, schema

Array = Any


def attention(q, k, v, heads: int, norms=None, eps: float = 1e-6, ids=None, causal: bool = False) -> Array:
    """softmax(q k^T) v, a matrix per head: [B, L, heads * width] of the shape of q, k and v.

    Args:
      q, k, v: [B, L, heads * width], the heads side by side.
      heads: their number.
      norms: scale and bias of the queries' LayerNorm, then of the keys', [width] each; None: no norms.
      eps: of the norms.
      ids: [B, L], the text of each position, which sees that text alone; None: every position sees all.
      causal: whether positions see no later ones; read with `ids` alone.
    """
    batch, length, lanes = q.shape
    width = lanes // heads
    q, k, v = (x.reshape(batch, length, heads, width).transpose(0, 2, 1, 3) for x in (q, k, v))
    if norms is not None:

        def norm(x, scale, bias):
            mean = x.mean(-1, keepdims=True)
            variance = ((x - mean) ** 2).mean(-1, keepdims=True)
            return (x - mean) / jnp.sqrt(variance + eps) * scale + bias

        q, k = norm(q, *norms[:2]), norm(k, *norms[2:])
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(width)
    if ids is not None:
        numbers = np.arange(length)
        earlier = (numbers[:, None] >= numbers[None]) | (not causal)
        allowed = (ids[:, :, None] == ids[:, None, :]) & earlier
        scores = jnp.where(allowed[:, None], scores, -1e300)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return (weights @ v).transpose(0, 2, 1, 3).reshape(batch, length, lanes)


def layer(params, x, heads: int, **options) -> Array:
    """`models.attention.Attention` of [B, L, E] to itself, from its parameters; `options` of `attention`."""
    affine = lambda name: jnp.einsum("ble,ekh->blkh", x, params[name]["kernel"]) + params[name]["bias"]
    q, k, v = (affine(name).reshape(x.shape) for name in ("query", "key", "value"))
    norms = [params[f"{n}_norm"][part] for n in ("query", "key") for part in ("scale", "bias")]
    out = attention(q, k, v, heads, norms, **options)
    return out @ params["out"]["kernel"].reshape(x.shape[-1], -1) + params["out"]["bias"]


def image_text(image, texts, ids, scale) -> Array:
    """L_ic and L_id with the whole matrix: image [B, D], texts [B, S, D], their ids [B, S]."""
    z = scale * jnp.einsum("id,jkd->ijk", image, texts, precision="highest")
    is_own = (ids[:, None, None] == ids[:, :, None]).any(-1)  # [i, j, k]: whether text jk is one of image i's
    negative = jnp.where(is_own, -jnp.inf, z)
    own_logits = jnp.einsum("iik->ik", z)
    of_text, of_image = (jax.nn.logsumexp(negative, axis) for axis in (0, (1, 2)))
    to_image, to_text = jnp.logaddexp(own_logits, of_text), jnp.logaddexp(own_logits, of_image[:, None])
    return jnp.mean(to_image + to_text - 2 * own_logits) / 2


def region_description(regions, descriptions, ids, scale) -> Array:
    """L_rd with the whole matrix: row j of both [n, D] is region j, whose text is ids[j]."""
    z = scale * jnp.einsum("nd,md->nm", regions, descriptions, precision="highest")
    no_negative = (ids[:, None] == ids) & ~jnp.eye(len(ids), dtype=bool)
    return jnp.mean(jax.nn.logsumexp(jnp.where(no_negative, -jnp.inf, z), axis=1) - jnp.diag(z))


def losses(outputs: schema.Outputs, batch: schema.Batch) -> dict[str, Array]:
    """The terms by name, where every region is real, and query j is matched with region j."""
    scale, ids = outputs.scales.logit_scale, batch.description_id.reshape(-1)
    count, width = batch.region_mask.shape[1], outputs.image_embed.shape[-1]
    texts, in_boxes = (x.reshape(-1, width) for x in (outputs.region_text_embed, outputs.box_embed))
    matched = outputs.region_embed[:, :count].reshape(-1, width)
    predicted, target = outputs.pred_boxes_cxcywh[:, -1, :count], batch.region_boxes_cxcywh
    giou = boxes.giou(*map(boxes.cxcywh_to_xyxy, (predicted, target)))
    both_ways = (in_boxes, texts), (texts, in_boxes)
    return {
        "image_caption": image_text(outputs.image_embed, outputs.text_embed, batch.caption_id, scale),
        "image_description": image_text(
            outputs.image_embed, outputs.region_text_embed, batch.description_id, scale
        ),
        "box": jnp.mean(jnp.abs(predicted - target).sum(-1) + 1 - giou),
        "region_description": region_description(matched, texts, ids, scale),
        "box_description": sum(region_description(*pair, ids, scale) for pair in both_ways) / 2,
    }


def example(images: int, width: int) -> tuple[schema.Outputs, schema.Batch]:
    """Random float32 embeddings of `width` for which `losses` holds: 2 captions, 4 regions, 5 queries."""
    rng, captions, regions, queries = np.random.default_rng(0), 2, 4, 5
    unit = lambda *shape: (
        (x := rng.normal(size=(images, *shape, width))) / np.linalg.norm(x, axis=-1)[..., None]
    )
    extent = rng.uniform(0.1, 0.3, (images, regions, 2))
    centre = rng.uniform(0.2, 0.8, (images, regions, 2))
    target = np.concatenate([centre, extent], -1)
    predicted = np.full((images, 1, queries, 4), 0.01)
    predicted[:, 0, :regions] = target * rng.uniform(0.97, 1.03, target.shape)
    scales = schema.Scales(np.float64(12), np.float64(0))
    embeds = unit(), unit(captions), unit(queries), unit(regions)
    outputs = schema.Outputs(*embeds, predicted, scales, box_embed=unit(regions))
    ids = lambda count: rng.integers(1, 3 * images, (images, count)).astype(np.int32)
    real = np.ones((images, regions), bool)
    batch = schema.Batch(*[None] * len(schema.Batch._fields))._replace(
        caption_id=ids(captions),
        caption_mask=np.ones((images, captions), bool),
        description_id=ids(regions),
        region_boxes_cxcywh=target.astype(np.float32),
        region_mask=real,
    )
    return jax.tree.map(np.float32, outputs), batch
