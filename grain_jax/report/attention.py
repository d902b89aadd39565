"""The cross-attention of the region decoder: of every layer, head and query over the image tokens.

The model does not return it, and Flax captures no intermediates inside the scan over its layers. So the layers run here
one after the other, each with its slice of the parameters.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.models import grain, region_decoder

_PARTS = ("query", "key", "value", "out")  # submodules of an attention layer


class Attention(NamedTuple):
    """Attention of B images: T layers, K heads, N image tokens, Q region queries and, last, the image query."""

    weights: np.ndarray  # float32 [T, B, K, Q+1, N], sums to 1 over the tokens
    values: np.ndarray  # float32 [T, B, N, K, head_dim]
    outputs: np.ndarray  # float32 [T, B, Q+1, E], outputs of the attention layers
    content: np.ndarray  # float32 [B, Q+1, E], output of the last layer, before the final norm


def cross_attention(
    model: config_lib.Model, params: Mapping[str, Any], images: np.ndarray
) -> Attention:
    """The cross-attention of the decoder for some images.

    Args:
      model: a model with a region decoder.
      params: its parameters, as `inference.Predictor.params`.
      images: uint8 [B, S, S, 3], resized to the image size S of the model.

    Raises:
      ValueError: the model has no region decoder.
    """
    return Attention(*jax.tree.map(np.asarray, _program(model)(params, images)))


def grid(model: config_lib.Model) -> tuple[int, int]:
    """(number of leading tokens that are no patches, patches along a side of the image)."""
    tower = model.image
    leading = int(tower.class_token) + tower.registers
    return leading, tower.image_size // tower.patch_size


@functools.lru_cache(maxsize=4)
def _program(model: config_lib.Model):
    tower, dtype = model.decoder, jnp.dtype("float32")
    if tower is None:
        raise ValueError("got a model without a region decoder, expected one with it")
    module, block = grain.GRAIN(model), region_decoder.DecoderLayer(tower, dtype)

    def is_memory(part: nn.Module, _: str) -> bool:
        return part.name == "memory_norm"

    def is_attention(part: nn.Module, _: str) -> bool:
        return part.name in _PARTS and part.path[:1] == ("cross_attention",)

    def run(params, images):
        with jax.default_matmul_precision("highest"):
            applied: Any = module.apply(
                {"params": params},
                images,
                method=grain.GRAIN.image_features,
                capture_intermediates=is_memory,
                mutable=["intermediates"],
            )
            (memory,) = applied[1]["intermediates"]["decoder"]["memory_norm"]["__call__"]
            decoder = params["decoder"]
            query_embed = decoder["query_embed"]
            content = jnp.zeros((memory.shape[0], *query_embed.shape), dtype)
            layers = []
            for i in range(tower.depth):
                own = jax.tree.map(lambda x, i=i: x[i], decoder["blocks"])
                applied = block.apply(
                    {"params": own},
                    content,
                    i,
                    memory,
                    query_embed,
                    None,
                    capture_intermediates=is_attention,
                    mutable=["intermediates"],
                )
                (content, _), captured = applied
                found = captured["intermediates"]["cross_attention"]
                query, key, value, out = (found[name]["__call__"][0] for name in _PARTS)
                logits = jnp.einsum("bqkh,bskh->bkqs", query * query.shape[-1] ** -0.5, key)
                layers.append((nn.softmax(logits), value, out))
        return (*(jnp.stack(x) for x in zip(*layers)), content)

    return jax.jit(run)
