"""What a local term sees, of random features and embeddings without a model."""

import flax.linen as nn
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


def seen(config, teacher=None, student=None, leading=0, seed=0) -> Seen:
    """Of `tiny.batch`: tokens of the image tower's size and unit embeddings of the joint space."""
    rng, batch, model = np.random.default_rng(seed), tiny.batch(config, seed), config.model
    (b, captions), r, d = batch.caption_mask.shape, batch.region_mask.shape[1], model.embed_dim
    patches = (model.image.image_size // model.image.patch_size) ** 2
    outputs = schema.Outputs(
        image_embed=unit(rng, b, d),
        text_embed=unit(rng, b, captions, d),
        region_embed=unit(rng, b, 3, d),
        region_text_embed=unit(rng, b, r, d),
        pred_boxes_cxcywh=None,
        logit_scale=np.float32(9),
        logit_bias=np.float32(0),
        box_embed=unit(rng, b, r, d) if model.boxes.kind != "none" else None,
    )
    return Seen(
        batch=batch,
        tokens=rng.normal(size=(b, leading + patches, model.image.width)).astype(np.float32),
        hidden=None,
        text_features=None,
        outputs=outputs,
        leading=leading,
        keys=jax.vmap(jax.random.key)(jnp.arange(b, dtype=jnp.uint32)),
        student=student,
        teacher=teacher,
        views=None,
        state={},
        share=jnp.zeros(()),
    )


def part(seen: Seen, start: int, stop: int) -> Seen:
    """Some of the images; texts stay where they are."""
    cut = lambda x: x[start:stop] if np.ndim(x) else x
    fields = {"tokens": seen.tokens, "keys": seen.keys, "outputs": seen.outputs}
    fields["batch"] = seen.batch._replace(
        text_tokens=None,
        text_positions=None,
        text_segments=None,
        texts_dropped=None,
        text_counts=None,
    )
    return seen._replace(**{name: jax.tree.map(cut, x) for name, x in fields.items()})


def random_parameters(term, seen: Seen, seed=0):
    """Parameters of the term's shapes."""
    rng = np.random.default_rng(seed)
    made = nn.unbox(jax.eval_shape(lambda: term.init(jax.random.key(0), seen).get("params", {})))
    return jax.tree.map(lambda x: np.asarray(0.3 * rng.normal(size=x.shape), np.float32), made)
