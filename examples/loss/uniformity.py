"""A loss term of a user: the region queries of an image are spread over the sphere (Wang and Isola 2020, uniformity).

Switch it on in a config file,

    c.loss.terms.uniformity = {"term": "examples.loss.uniformity:uniformity", "weight": 0.1, "t": 2.0}

or on the command line, `--config.loss.terms.uniformity.term=examples.loss.uniformity:uniformity
--config.loss.terms.uniformity.weight=0.1`. metrics.jsonl has it as `loss_uniformity`, and the mean cosine of two
queries of an image as `uniformity/cosine`.
"""

import jax
import jax.numpy as jnp

from grain_jax import losses
from grain_jax.losses import streaming


def uniformity(shard: losses.Shard, *, t: float = 2.0) -> losses.TermOutput:
    """log of the mean of exp(-t |x - y|^2) over the pairs x, y of region queries of an image; a mean over images.

    Args:
      shard: the images of one device; sums and counts of all devices are added.
      t: sharpness, more than 0; the larger, the more the nearest pairs count.
    """
    x = shard.outputs.region_embed  # [b, Q, D], unit length
    images, queries, _ = x.shape
    cosine = streaming.similarity(x, x)  # [b, Q, Q]
    others = ~jnp.eye(queries, dtype=bool)
    pairs = queries * (queries - 1)
    value = jax.nn.logsumexp(-t * (2 - 2 * cosine), axis=(1, 2), where=others) - jnp.log(pairs)
    count = jnp.float32(images)
    return losses.TermOutput(
        losses.Mean(value.sum(), count),
        {"cosine": losses.Mean(jnp.where(others, cosine, 0).sum() / pairs, count)},
    )
