"""A text tower of one's own: each token sees the tokens just before it (ByteNet, Kalchbrenner et al. 2016).

In a config: `c.model.text.tower = "examples.tower.windows:Windows"`; `c.model.text.options = dict(window=3)`.
`width`, `depth`, `mlp_dim` and `norm_eps` of `model.text` mean what they mean for the built-in tower.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.models import layers, placement, towers


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of `model.text.options`."""

    window: int = 3  # tokens that a layer reads: one and those just before it


class Layer(nn.Module):
    """An MLP of a token and those before it, added to its input."""

    config: config_lib.TextTower
    dtype: np.dtype

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, None]:
        """[B, L, E], int32 [B, L] -> (carry [B, L, E], no per-layer output)."""
        c, init = self.config, layers.normal(0.02)
        y = layers.LayerNorm(c.norm_eps, name="norm")(x)
        # A position below n has no n-th token before it in its text; what lies there is another text's.
        before = [jnp.roll(y, n, axis=1) * (positions >= n)[..., None] for n in range(c.options.window)]
        mlp = layers.MLP(c.width, c.mlp_dim, "gelu", self.dtype, init, init, name="mlp")
        return placement.by_batch(x + mlp(jnp.concatenate(before, axis=-1))), None


class Windows(towers.TextTower):
    """Each feature is of the last `depth * (window - 1) + 1` tokens of its text."""

    Options = Options

    @classmethod
    def packable(cls, config) -> bool:
        """No token sees one of another text, or padding."""
        return True

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """int32 [G, rows, L] each -> [G, rows, L, E]."""
        c, length, axes = self.config, tokens.shape[-1], ("vocab", "width")
        table = layers.parameter(self, "token_embed", layers.normal(0.02), axes, (c.vocab_size, c.width))
        x = placement.lookup(table, tokens.reshape(-1, length), self.dtype)
        blocks = layers.scan_layers(Layer, c.depth, remat=self.remat, unroll=1, in_axes=(nn.broadcast,))
        x, _ = blocks(c, self.dtype, name="blocks")(x.astype(self.dtype), positions.reshape(-1, length))
        return x.reshape(*tokens.shape, c.width)
