"""The image tower "vit": a vision transformer whose tokens all go to the region decoder (docs/method.md, Model).

Its options also make it the tower of CLIP or SigLIP, whose tokens a model without a decoder pools.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.models import attention, layers, placement, towers


def sincos2d(grid: int, width: int, period: float) -> np.ndarray:
    """Sine-cosine position features of a square grid, float32 [grid * grid, width] (as in MoCo v3, period 1e4).

    Wavelengths go from 2 pi patches to `period` times that: with 1e4 most are constant over a small grid.
    """
    omega = period ** -(np.arange(width // 4) / (width // 4))
    y, x = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    out = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return np.pad(out, ((0, 0), (0, width - out.shape[1]))).astype(np.float32)


def _inits(tower: config_lib.ImageTower) -> layers.LayerInits:
    if (
        tower.block_init == "torch"
    ):  # quirk 13: the reference builds its blocks anew after timm's init
        return layers.LayerInits(*[layers.torch_linear] * 4, attention_bias=layers.torch_bias)
    # timm's trunc_normal_(std=0.02) truncates at -2 and 2, which is 100 standard deviations: a normal.
    # JAX's truncated_normal truncates at two standard deviations, which leaves one of 0.0176.
    return layers.LayerInits(*[layers.normal(0.02)] * 4, mlp_bias=lambda fan_in: layers.zeros)


class ImageTransformer(towers.ImageTower):
    """Images to tokens: the class token first (if there is one), then patches row by row."""

    @classmethod
    def leading_tokens(cls, config: config_lib.ImageTower) -> int:
        """The class token."""
        return int(config.class_token)

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Normalised images [B, H, W, 3] -> tokens [B, N, E], after the final norm."""
        t = self.config
        x = image.astype(self.dtype)
        patch = t.patch_size
        batch, height, width, channels = x.shape
        grid = height // patch
        x = x.reshape(batch, grid, patch, width // patch, patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch**2 * channels)  # [B, P, p*p*3]
        x = layers.dense(
            t.width,
            ("patch",),
            ("width",),
            dtype=self.dtype,
            kernel_init=layers.torch_linear,
            bias_init=layers.torch_bias(x.shape[-1]),
            use_bias=t.patch_bias,
            name="patch_embed",
        )(x)
        token = None
        if t.class_token:
            token = layers.parameter(
                self, "class_token", layers.normal(1e-6), ("vector",), (t.width,)
            )

        def init_positions(key, shape, dtype=jnp.float32):
            if t.position_init == "normal":
                return layers.normal(0.02)(key, shape, dtype)
            return jnp.pad(
                jnp.asarray(sincos2d(grid, t.width, t.position_period), dtype),
                ((int(t.class_token), 0), (0, 0)),
            )

        shape = (t.class_token + x.shape[1], t.width)
        positions = layers.parameter(
            self, "position_embed", init_positions, ("positions", "width"), shape
        )
        if token is not None:
            token = jnp.broadcast_to(token, (batch, 1, t.width)).astype(self.dtype)
            x = jnp.concatenate([token, x], axis=1)
        x = x + positions[None].astype(self.dtype)  # [B, N, E]
        if t.pre_norm:
            x = layers.LayerNorm(t.norm_eps, name="pre_norm")(x)
        x = placement.by_batch(x)
        program = attention.choose(self.attention, self.dtype, t.heads)
        blocks = layers.scan_layers(
            layers.TowerLayer, t.depth, remat=self.remat, unroll=t.unroll, in_axes=()
        )(t, self.dtype, _inits(t), program, t.qk_norm, name="blocks")
        x, _ = blocks(x)
        return layers.LayerNorm(t.norm_eps, name="norm")(x)
