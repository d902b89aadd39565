"""The text tower "transformer": CLIP's causal transformer over packed rows (docs/method.md, Packing).

The features of a text are read at its end token. A tower that attends to its padding, such as SigLIP's, is not
packable: each text has a row of its own.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.models import attention, layers, placement, towers


def _inits(tower: config_lib.TextTower) -> layers.LayerInits:
    """CLIP's: scaled by depth; the biases of the MLP as in torch."""
    out = layers.normal(tower.width**-0.5 * (2 * tower.depth) ** -0.5)
    qkv, mlp_in = layers.normal(tower.width**-0.5), layers.normal((2 * tower.width) ** -0.5)
    return layers.LayerInits(qkv, out, mlp_in, out)


def sinusoids(length: int, width: int) -> np.ndarray:
    """Sines, then cosines of the positions, float32 [length, width]; waves of 2 pi to 2 pi 10^4 (tensor2tensor's)."""
    half = width // 2
    omega = np.exp(-math.log(1e4) / max(half - 1, 1) * np.arange(half))
    angles = np.arange(length)[:, None] * omega
    out = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(out, ((0, 0), (0, width % 2))).astype(np.float32)


def unpadded(config: config_lib.TextTower, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Rows of one text each, int32 [..., L] -> bool [..., L], the tokens that are no padding."""
    return (segments > 0) & (tokens != config.pad_id)


def masked_mean(rows: jax.Array, real: jax.Array) -> jax.Array:
    """Rows [N, L, E] -> [N, E], the mean over the positions where `real` [N, L] is true; 0 where it is nowhere."""
    count = jnp.maximum(real.sum(axis=1, keepdims=True), 1)
    total = jnp.where(real[..., None], rows.astype(jnp.float32), 0).sum(axis=1)
    return (total / count).astype(rows.dtype)


class TextTransformer(towers.TextTower):
    """Rows of tokens to the features of every position."""

    @classmethod
    def packable(cls, config: config_lib.TextTower) -> bool:
        """Whether no feature depends on the padding."""
        return config.causal and config.pool == "end"

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """int32 [G, rows, L] each -> [G, rows, L, E], before the final norm, which is the model's."""
        t = self.config
        shape = tokens.shape
        tokens, positions, segments = (
            a.reshape(-1, shape[-1]) for a in (tokens, positions, segments)
        )
        real = None
        if t.pool == "masked_mean":
            real = unpadded(t, tokens, segments)[:, None, None]  # [G*rows, 1, 1, L]
        if not self.packable(t):  # the padding is a token of the text, with positions that count on
            tokens = jnp.where(segments > 0, tokens, t.pad_id)
            positions = jnp.broadcast_to(jnp.arange(shape[-1]), tokens.shape)
            segments = jnp.ones_like(segments)
        token_embed = nn.Embed(
            t.vocab_size,
            t.width,
            embedding_init=nn.with_logical_partitioning(layers.normal(0.02), ("vocab", "width")),
            name="token_embed",
        ).embedding
        # Looked up in float32: the gradient of a frequent token is a sum over thousands of positions.
        x = placement.whole(token_embed)[tokens]
        if t.scale_tokens:
            x = x * math.sqrt(t.width)
        x = x + self._positions()[positions]
        x = placement.by_batch(x.astype(self.dtype))  # [G*rows, L, E]
        program = attention.choose(self.attention, self.dtype, t.heads, t.pool == "masked_mean")
        mask = real
        if t.causal:
            within = attention.CausalWithin(segments)
            mask = within.mask() if program == "xla" else within  # once for all layers
        blocks = layers.scan_layers(
            layers.TowerLayer, t.depth, remat=self.remat, unroll=t.unroll, in_axes=(nn.broadcast,)
        )(t, self.dtype, _inits(t), program, name="blocks")
        x, _ = blocks(x, mask)
        return x.reshape(*shape, t.width)

    def _positions(self) -> jax.Array:
        """[context length, E], float32."""
        t = self.config
        if t.position_kind == "sinusoidal":
            return jnp.asarray(sinusoids(t.context_length, t.width))
        shape = (t.context_length, t.width)
        return placement.whole(
            layers.parameter(
                self, "position_embed", layers.normal(0.01), ("positions", "width"), shape
            )
        )


def gather_texts(features: jax.Array, at: jax.Array) -> jax.Array:
    """The features at the end token of each text.

    Args:
      features: [G, rows, L, E].
      at: int32 [B, ..., 2], (row within the image's group, position); B is a multiple of G.

    Returns:
      [B, ..., E].
    """
    groups, rows, length, width = features.shape
    index = at[..., 0] * length + at[..., 1]  # [B, ...]
    picked = jnp.take_along_axis(
        features.reshape(groups, rows * length, width),
        index.reshape(groups, index.size // groups, 1),
        axis=1,
    )
    return picked.reshape(*index.shape, width)
