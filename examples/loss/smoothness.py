"""A local loss term of a user: neighbouring patches are alike, unless an edge of the image lies between.

It sees tokens and pixels of a micro-batch, which a term of the global batch (phrases.py) cannot. An edge
weighs exp(-|colour difference|), as in depth estimation (Godard et al. 2017). Switch it on in a config file,

    c.loss.terms.smooth = {"term": "examples.loss.smoothness:Smoothness", "weight": 0.05, "edge": 10.0}

metrics.jsonl has it as `loss_smooth`, and the mean cosine of two neighbours as `smooth/cosine`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from grain_jax.losses import local
from grain_jax.models import box_head, grain


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of the term."""

    edge: float = 10.0  # how sharply a difference of colours, in [0, 1], parts two patches


class Smoothness(local.LocalTerm):
    """exp(-edge * colour difference) * (1 - cosine) of neighbouring patches, mean over pairs and images."""

    Options: ClassVar[type] = Options

    def __call__(self, seen: local.Seen) -> local.LocalOutput:
        """The sum over the pairs of each image."""
        patches = grain.normalize(seen.tokens[:, seen.leading :])  # [B, h * w, E]
        batch, count, width = patches.shape
        side = box_head.grid_size(count, 0)
        patches = patches.reshape(batch, side, side, width)
        colours = jax.image.resize(
            seen.batch.image.astype(jnp.float32) / 255, (batch, side, side, 3), "linear"
        )
        loss, cosines, pairs = 0.0, 0.0, 0
        for axis in (1, 2):
            here = lambda x, axis=axis: jax.lax.slice_in_dim(x, 0, side - 1, axis=axis)
            there = lambda x, axis=axis: jax.lax.slice_in_dim(x, 1, side, axis=axis)
            cosine = jnp.sum(here(patches) * there(patches), axis=-1)
            weight = jnp.exp(-self.options.edge * jnp.abs(here(colours) - there(colours)).mean(axis=-1))
            loss += (weight * (1 - cosine)).sum((1, 2))
            cosines += cosine.sum((1, 2))
            pairs += cosine[0].size
        count = jnp.full(batch, pairs, jnp.float32)
        return local.LocalOutput(local.PerImage(loss, count), {"cosine": local.PerImage(cosines, count)})
