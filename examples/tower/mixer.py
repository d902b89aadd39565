"""An image tower of one's own: MLP-Mixer (Tolstikhin et al. 2021), mixing along tokens and along features.

In a config file:

    c.model.image.tower = "examples.tower.mixer:Mixer"
    c.model.image.options = dict(token_dim=64)

`width`, `depth`, `mlp_dim`, `patch_size` and `norm_eps` of `model.image` mean what the built-in tower says.
"""

import dataclasses

import flax.linen as nn
import jax
import numpy as np

from grain_jax.models import layers, placement, towers


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of `model.image.options`."""

    token_dim: int = 64  # hidden units of the MLP along the tokens
    kernel: int = 3  # of the convolution before the layers; odd


class Block(nn.Module):
    """An MLP along the tokens and one along the features, each added to its input."""

    width: int
    mlp_dim: int
    token_dim: int
    norm_eps: float
    dtype: np.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """[B, N, E] -> (carry [B, N, E], no per-layer output)."""
        init = layers.normal(0.02)
        y = layers.LayerNorm(self.norm_eps, name="norm_1")(x).swapaxes(1, 2)  # [B, E, N]
        for name, features, axes in (
            ("tokens_in", self.token_dim, (("positions",), ("mlp",))),
            ("tokens_out", x.shape[1], (("mlp",), ("positions",))),
        ):
            y = layers.dense(features, *axes, dtype=self.dtype, kernel_init=init, name=name)(y)
            y = nn.gelu(y) if name == "tokens_in" else y
        x = x + y.swapaxes(1, 2)
        y = layers.LayerNorm(self.norm_eps, name="norm_2")(x)
        mlp = layers.MLP(self.width, self.mlp_dim, "gelu", self.dtype, init, init, name="mlp")
        return placement.by_batch(x + mlp(y)), None


class Mixer(towers.ImageTower):
    """Images to one token a patch."""

    Options = Options

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Normalised images [B, S, S, 3] -> tokens [B, N, E]."""
        c, options = self.config, self.config.options
        x = image.astype(self.dtype)
        kernel = layers.parameter(
            self,
            "stem",
            nn.initializers.lecun_normal(),
            ("positions", "positions", "patch", "vector"),
            (options.kernel, options.kernel, 3, 16),
        )
        x = jax.lax.conv_general_dilated(
            x, kernel.astype(self.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        batch, side, patch = x.shape[0], c.image_size // c.patch_size, c.patch_size
        x = x.reshape(batch, side, patch, side, patch, 16).transpose(0, 1, 3, 2, 4, 5)
        x = layers.dense(
            c.width,
            ("patch",),
            ("width",),
            dtype=self.dtype,
            kernel_init=layers.torch_linear,
            name="patch_embed",
        )(x.reshape(batch, side * side, -1))  # [B, N, E]
        blocks = layers.scan_layers(Block, c.depth, remat=self.remat, unroll=1, in_axes=())
        block = blocks(c.width, c.mlp_dim, options.token_dim, c.norm_eps, self.dtype, name="blocks")
        x, _ = block(placement.by_batch(x))
        return layers.LayerNorm(c.norm_eps, name="norm")(x)
