"""The text tower "transformer": CLIP's causal transformer over packed rows (docs/method.md, Packing).

The features of a text are read at its end token, or pooled of its own positions. A tower that attends to its
padding, such as SigLIP's, is not packable: each text has a row of its own. With `mask_padding` it is.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from grain_jax import config as config_lib
from grain_jax.models import attention, layers, placement, tower_layer, towers


def _inits(tower: config_lib.TextTower) -> tower_layer.LayerInits:
    """CLIP's: scaled by depth; the biases of the MLP as in torch."""
    out = layers.normal(tower.width**-0.5 * (2 * tower.depth) ** -0.5)
    qkv, mlp_in = layers.normal(tower.width**-0.5), layers.normal((2 * tower.width) ** -0.5)
    return tower_layer.LayerInits(qkv, out, mlp_in, out)


def masked_mean(rows: jax.Array, real: jax.Array) -> jax.Array:
    """Rows [N, L, E] -> [N, E], the mean over the positions where `real` [N, L] is true; or 0."""
    count = jnp.maximum(real.sum(axis=1, keepdims=True), 1)
    total = jnp.where(real[..., None], rows.astype(jnp.float32), 0).sum(axis=1)
    return (total / count).astype(rows.dtype)


class TextTransformer(towers.TextTower):
    """Rows of tokens to the features of every position."""

    @classmethod
    def packable(cls, config: config_lib.TextTower) -> bool:
        """Whether no feature depends on the padding."""
        return config_lib.shares_rows(config)

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """int32 [G, rows, L] each -> [G, rows, L, E], before the final norm, which is the model's."""
        t = self.config
        shape = tokens.shape
        tokens, positions, segments = (a.reshape(-1, shape[-1]) for a in (tokens, positions, segments))
        if not self.packable(t):  # the padding is a token of the text, with positions that count on
            tokens = jnp.where(segments > 0, tokens, t.pad_id)
            positions = jnp.broadcast_to(jnp.arange(shape[-1]), tokens.shape)
            segments = jnp.ones_like(segments)
        program, length = attention.choose(self.attention, self.dtype, t.heads), shape[-1]
        extra = attention.filled(length, program, 8) - length  # cuBLAS takes eights
        if extra:  # with padding, a text of its own
            fill = lambda ids: jnp.pad(ids, ((0, 0), (0, extra)))
            tokens, positions, segments = fill(tokens), fill(positions), fill(segments)
        token_embed = nn.Embed(
            t.vocab_size,
            t.width,
            embedding_init=nn.with_logical_partitioning(layers.normal(0.02), ("vocab", "width")),
            name="token_embed",
        ).embedding
        x = placement.lookup(token_embed, tokens, self.dtype)
        shape_of_positions = (t.context_length, t.width)
        table = layers.parameter(
            self, "position_embed", layers.normal(0.01), ("positions", "width"), shape_of_positions
        )
        x = x + placement.whole(table)[positions]
        x = placement.by_batch(x.astype(self.dtype))  # [G*rows, L, E]
        mask = attention.First(length) if extra else None
        if t.causal or t.mask_padding:
            mask = (attention.CausalWithin if t.causal else attention.Within)(segments)
            mask = mask.mask() if program == "xla" else mask  # once for all layers
        blocks = layers.scan_layers(
            tower_layer.TowerLayer,
            t.depth,
            remat=self.remat,
            unroll=layers.unrolled(t, self.remat, program),
            in_axes=(nn.broadcast,),
        )(t, self.dtype, _inits(t), program, lora=self.lora, name="blocks")
        x, _ = blocks(x, mask)
        return x[:, :length].reshape(*shape, t.width)


def gather_texts(features: jax.Array, end_at: jax.Array) -> jax.Array:
    """The features at the end token of each text.

    Args:
      features: [G, rows, L, E].
      end_at: int32 [B, ..., 2], (row within the image's group, position); B is a multiple of G.

    Returns:
      [B, ..., E].
    """
    groups, rows, length, width = features.shape
    index = end_at[..., 0] * length + end_at[..., 1]  # [B, ...]
    picked = jnp.take_along_axis(
        features.reshape(groups, rows * length, width), index.reshape(groups, index.size // groups, 1), axis=1
    )
    return picked.reshape(*index.shape, width)


def rows_of_texts(features: jax.Array, segments: jax.Array, end_at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The row of each of N texts, [N, L, E], and where it has tokens of the text, bool [N, L].

    Args:
      features: [G, rows, L, E].
      segments: int32 [G, rows, L], 0 for padding.
      end_at: int32 [B, ..., 2], as `gather_texts` takes it; it names N texts.
    """
    groups, _, length, width = features.shape
    row = end_at[..., 0].reshape(groups, -1, 1)
    of_row = jnp.take_along_axis(segments, row, axis=1)
    segment = jnp.take_along_axis(of_row, end_at[..., 1].reshape(groups, -1, 1), axis=2)
    rows = jnp.take_along_axis(features, row[..., None], axis=1).reshape(-1, length, width)
    return rows, ((of_row == segment) & (of_row > 0)).reshape(-1, length)
