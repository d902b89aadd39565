"""Text tower: CLIP's causal transformer over packed rows, read at each text's end token (docs/method.md, Packing).

A tower that sees its padding (`not TextTower.packable`), such as SigLIP's, has one text in each row.
"""

import flax.linen as nn
import jax.numpy as jnp

from grain_jax.config import TextTower
from grain_jax.models import layers, placement


class Block(nn.Module):
    """Pre-norm attention and MLP, with CLIP's depth-scaled init; as there, the MLP's biases are torch's."""

    tower: TextTower
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        """x [rows, L, E], mask bool [rows, 1, L, L] or None -> [rows, L, E] and no per-layer output."""
        t = self.tower
        out_init = layers.normal(t.width**-0.5 * (2 * t.depth) ** -0.5)
        y = layers.LayerNorm(t.norm_eps, name="norm_1")(x)
        x = x + layers.Attention(
            t.width,
            t.heads,
            self.dtype,
            kernel_init=layers.normal(t.width**-0.5),
            out_init=out_init,
            name="attention",
        )(y, y, y, mask)
        y = layers.LayerNorm(t.norm_eps, name="norm_2")(x)
        x = x + layers.MLP(
            t.width,
            t.mlp_dim,
            t.activation,
            self.dtype,
            in_init=layers.normal((2 * t.width) ** -0.5),
            out_init=out_init,
            in_bias_init=layers.torch_bias(t.width),
            out_bias_init=layers.torch_bias(t.mlp_dim),
            name="mlp",
        )(y)
        return placement.by_batch(x), None


class TextTransformer(nn.Module):
    """Token rows to features of every position."""

    tower: TextTower
    dtype: jnp.dtype
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens, positions, segments):
        """int32 [G, rows, L] each -> [G, rows, L, E], before the final norm (`self.norm` is the caller's)."""
        t = self.tower
        shape = tokens.shape
        tokens, positions, segments = (
            a.reshape(-1, shape[-1]) for a in (tokens, positions, segments)
        )
        if (
            not t.packable
        ):  # the padding belongs to the text: its own token, and positions that go on
            tokens = jnp.where(segments > 0, tokens, t.pad_id)
            positions = jnp.broadcast_to(jnp.arange(shape[-1]), tokens.shape)
            segments = jnp.ones_like(segments)
        token_embed = nn.Embed(
            t.vocab_size,
            t.width,
            embedding_init=nn.with_logical_partitioning(layers.normal(0.02), ("vocab", "width")),
            name="token_embed",
        ).embedding
        position_embed = self.param(
            "position_embed",
            nn.with_logical_partitioning(layers.normal(0.01), ("positions", "width")),
            (t.context_length, t.width),
        )
        # Looked up in float32: the gradient of a frequent token is a sum over thousands of places.
        x = placement.whole(token_embed)[tokens] + placement.whole(position_embed)[positions]
        x = placement.by_batch(x.astype(self.dtype))  # [G*rows, L, E]
        mask = None
        if t.causal:
            # And within the same text. Padding is a segment of its own, so no row of the mask is empty.
            causal = jnp.tril(jnp.ones((shape[-1], shape[-1]), bool))
            mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
        x, _ = layers.scan_layers(
            Block, t.depth, remat=self.remat, unroll=t.unroll, in_axes=(nn.broadcast,)
        )(t, self.dtype, name="blocks")(x, mask)
        return x.reshape(*shape, t.width)


def gather_texts(features, at):
    """The features at the texts' end tokens.

    Args:
      features: [G, rows, L, E].
      at: int32 [B, 2] or [B, R, 2], (row within the image's group, position); B is a multiple of G.

    Returns:
      [B, E] or [B, R, E].
    """
    groups, rows, length, width = features.shape
    index = at[..., 0] * length + at[..., 1]  # [B] or [B, R]
    picked = jnp.take_along_axis(
        features.reshape(groups, rows * length, width),
        index.reshape(groups, index.size // groups, 1),
        axis=1,
    )
    return picked.reshape(*index.shape, width)
