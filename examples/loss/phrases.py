"""A loss term of a user: each description finds its query among all queries of its image.

L_rd compares the descriptions for a query, and never the queries for a description. So queries of one image
may all be equally near to a phrase (docs/howto/regions.md has measurements). This term compares them. Switch
it on in a config file,

    c.loss.terms.phrases = {"term": "examples.loss.phrases:phrases", "weight": 1.0}

or on the command line, `--config.loss.terms.phrases.term=examples.loss.phrases:phrases
--config.loss.terms.phrases.weight=1`. metrics.jsonl has it as `loss_phrases`, and the share of descriptions
that find their query as `phrases/accuracy`.
"""

import jax
import jax.numpy as jnp

from grain_jax import losses
from grain_jax.losses import streaming


def phrases(shard: losses.Shard, *, temperature: float = 1.0) -> losses.TermOutput:
    """Softmax cross-entropy of each matched region's query, among the image's; a mean over the regions.

    A query that is matched to a region with the same description is no negative.

    Args:
      shard: the images of one device; sums and counts of all devices are added.
      temperature: more than 0; divides the logits, which have the scale of L_rd.
    """
    query = shard.outputs.region_embed  # [b, Q, D]
    text = shard.outputs.region_text_embed  # [b, R, D]
    if not query.shape[1]:  # no decoder
        return losses.TermOutput(losses.Mean(jnp.zeros(()), jnp.zeros(())), {})
    match, description = shard.match, shard.targets.description_id
    is_own = match.query_index[..., None] == jnp.arange(query.shape[1])  # [b, R, Q]
    is_own &= match.valid[..., None]
    same = description[:, :, None] == description[:, None]  # [b, R, R]
    fits = (same[..., None] & is_own[:, None]).any(axis=2)  # [b, R, Q]
    scale, _ = shard.outputs.scales.of_regions
    logits = scale / temperature * streaming.similarity(text, query)
    own_logit = jnp.where(is_own, logits, 0).sum(-1)
    others = jnp.where(fits, streaming.MASKED, logits)
    loss = jax.nn.softplus(jax.nn.logsumexp(others, axis=-1) - own_logit)
    real, count = match.valid, match.valid.sum().astype(jnp.float32)
    found = real & (own_logit > others.max(-1))
    return losses.TermOutput(
        losses.Mean(jnp.where(real, loss, 0).sum(), count),
        {"accuracy": losses.Mean(found.sum().astype(jnp.float32), count)},
    )
