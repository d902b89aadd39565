"""A text decoder: a small causal transformer that sees the tokens of an image, and writes texts and boxes.

Two tasks, each named by the first token of a sequence; what follows the bar is predicted:

    caption     CAPTION | words of the caption
    point       POINT words of a phrase | x0 y0 x1 y1

The words are token ids of the tokenizer, its special ones too, so that a text ends with its end token. A
coordinate is one of `bins` equal parts of a side of the image.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.models import attention, layers, placement

xavier = nn.initializers.xavier_uniform()
BOX = 4  # tokens of a box


class Vocabulary(NamedTuple):
    """The ids of the decoder: token ids, two tasks, the parts of a side."""

    words: int
    bins: int

    @property
    def caption(self) -> int:
        """The first token of a caption."""
        return self.words

    @property
    def point(self) -> int:
        """The first token of a phrase whose box is wanted."""
        return self.words + 1

    @property
    def first_bin(self) -> int:
        """The coordinate 0."""
        return self.words + 2

    @property
    def size(self) -> int:
        """All ids, up to a multiple of 8, so that a mesh may cut them."""
        return -(-(self.first_bin + self.bins) // 8) * 8

    def tokens_of(self, boxes_xyxy: jax.Array) -> jax.Array:
        """Boxes [..., 4] in [0, 1] -> int32 [..., 4]."""
        part = jnp.floor(boxes_xyxy * self.bins).astype(jnp.int32)
        return self.first_bin + jnp.clip(part, 0, self.bins - 1)

    def boxes_of(self, tokens: np.ndarray) -> np.ndarray:
        """int32 [..., 4] -> boxes [..., 4] in [0, 1], from the middles of the parts."""
        return (tokens - self.first_bin + 0.5) / self.bins


class Block(nn.Module):
    """Pre-norm: causal self-attention, attention to the image, MLP."""

    width: int
    heads: int
    mlp_dim: int
    dtype: np.dtype

    @nn.compact
    def __call__(self, x: jax.Array, image: jax.Array) -> jax.Array:
        """x [B, S, T, E], S sequences for each image [B, N, E*] -> [B, S, T, E]."""
        b, s, t, width = x.shape
        norm = lambda name, x: layers.LayerNorm(1e-6, name=name)(x)
        attend = lambda name: attention.Attention(
            self.width, self.heads, self.dtype, xavier, xavier, name=name
        )
        y = norm("norm_1", x).reshape(b * s, t, width)
        causal = jnp.tril(jnp.ones((t, t), bool))[None, None]
        x = x + attend("self_attention")(y, y, y, causal).reshape(x.shape)
        y = norm("norm_2", x).reshape(b, s * t, width)  # all sequences of an image share its keys
        x = x + attend("image_attention")(y, image, image).reshape(x.shape)
        mlp = layers.MLP(self.width, self.mlp_dim, "gelu", self.dtype, xavier, xavier, name="mlp")
        return placement.by_batch(x + mlp(norm("norm_3", x)))


class TextDecoder(nn.Module):
    """Tokens of sequences, and tokens of images, to logits."""

    vocabulary: Vocabulary
    width: int
    depth: int
    heads: int
    longest: int  # most tokens of a sequence
    dtype: np.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array, image: jax.Array) -> jax.Array:
        """tokens int32 [B, S, T], image [B, N, E*] -> logits of what follows each token, [B, S, T, ids]."""
        init = layers.normal(self.width**-0.5)
        shape = (self.vocabulary.size, self.width)
        embed = layers.parameter(self, "embed", init, ("vocab", "width"), shape)
        shape = (self.longest, self.width)
        positions = layers.parameter(self, "positions", init, ("positions", "width"), shape)
        x = placement.lookup(embed, tokens, np.dtype(self.dtype)) + positions[: tokens.shape[-1]]
        x, image = x.astype(self.dtype), layers.LayerNorm(1e-6, name="image_norm")(image)
        for i in range(self.depth):
            block = Block(self.width, self.heads, 4 * self.width, self.dtype, name=f"block_{i}")
            x = block(x, image)
        x = layers.LayerNorm(1e-6, name="norm")(x)
        head = layers.dense(
            self.vocabulary.size,
            ("width",),
            ("vocab",),
            dtype=np.dtype(self.dtype),
            kernel_init=init,
            name="head",
        )
        return head(x).astype(jnp.float32)
