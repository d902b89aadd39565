"""What a local term sees, of random features and embeddings without a model."""

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.core import schema
from grain_jax.losses.local import Seen
from tests import tiny


def unit(rng, *shape):
    """Random float32 vectors of unit length along the last axis."""
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def seen(config, leading=0, seed=0) -> Seen:
    """What a term sees of `tiny.batch`: tokens of the image tower's size and unit embeddings."""
    rng, batch, model = np.random.default_rng(seed), tiny.batch(config, seed), config.model
    (b, captions), r, d = batch.caption_mask.shape, batch.region_mask.shape[1], model.embed_dim
    patches = (model.image.image_size // model.image.patch_size) ** 2
    outputs = schema.Outputs(
        image_embed=unit(rng, b, d),
        text_embed=unit(rng, b, captions, d),
        region_embed=unit(rng, b, 3, d),
        region_text_embed=unit(rng, b, r, d),
        pred_boxes_cxcywh=None,
        scales=schema.Scales(np.float32(9), np.float32(0)),
        box_embed=unit(rng, b, r, d) if model.boxes.kind != "none" else None,
    )
    return Seen(
        batch=batch,
        tokens=rng.normal(size=(b, leading + patches, model.image.width)).astype(np.float32),
        text_hidden=None,
        outputs=outputs,
        leading=leading,
        keys=jax.vmap(jax.random.key)(jnp.arange(b, dtype=jnp.uint32)),
        apply=None,
        state={},
    )
