"""The image tower "vit": a vision transformer, all of whose tokens the decoder gets (docs/method.md, Model).

Its options also make it the tower of CLIP, SigLIP, PE-core or TIPS v2, whose tokens the model pools, and of
DINOv3.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.core import errors
from grain_jax.models import attention, layers, placement, rotary, tower_layer, towers


def sincos2d(grid: int, width: int, period: float) -> np.ndarray:
    """Sine-cosine position features of a square grid, float32 [grid * grid, width] (MoCo v3: period 1e4).

    Wavelengths go from 2 pi patches to `period` times that: with 1e4 most are constant over a small grid.
    """
    omega = period ** -(np.arange(width // 4) / (width // 4))
    y, x = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    out = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return np.pad(out, ((0, 0), (0, width - out.shape[1]))).astype(np.float32)


def resized_positions(positions: jax.Array, leading: int, grid: int) -> jax.Array:
    """Learned positions [N, E] for `grid` x `grid` patches; the first `leading` stay.

    As transformers' `interpolate_pos_encoding` for CLIP and SigLIP: bicubic with a = -0.75 (jax.image: -0.5),
    between centres of patches, with the border repeated and without antialiasing.
    """
    positions = placement.whole(positions)
    patches, width = positions[leading:], positions.shape[1]
    side = round(len(patches) ** 0.5)
    place = (np.arange(grid)[:, None] + 0.5) * side / grid - 0.5
    taps = np.floor(place) + np.arange(-1, 3)  # [grid, 4]
    x = np.abs(place - taps)
    near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
    is_at = taps.clip(0, side - 1)[..., None] == np.arange(side)
    weights = np.einsum("gt,gts->gs", np.where(x < 1, near, far), is_at).astype(np.float32)
    square = patches.reshape(side, side, width)
    square = jnp.einsum("gs,ht,ste->ghe", weights, weights, square, precision="highest")
    return jnp.concatenate([positions[:leading], square.reshape(-1, width)])


def of_kept(rows: jax.Array, kept: jax.Array) -> jax.Array:
    """Rows [P, E] by their numbers, int32 [B, n]: [B, n, E]; a product: a gather's gradient is a scatter."""
    is_at = (kept[..., None] == np.arange(len(rows))).astype(rows.dtype)
    return jnp.einsum("bnp,pe->bne", is_at, rows, precision=jax.lax.Precision.HIGHEST)


def of_pixels(image: jax.Array, patch_size: int) -> jax.Array:
    """Images [B, H, W, C] of whole patches -> their patches row by row, [B, P, p*p*C]."""
    batch, height, width, channels = image.shape
    p = patch_size
    x = jnp.reshape(image, (batch, height // p, p, width // p, p, channels))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)


def _inits(tower: config_lib.ImageTower) -> tower_layer.LayerInits:
    if tower.block_init == "torch":  # quirk 13: the reference builds its layers anew after timm's
        init = layers.torch_linear
        return tower_layer.LayerInits(init, init, init, init, attention_bias=layers.torch_bias)
    # timm's trunc_normal_(std=0.02) truncates at -2 and 2, which is 100 standard deviations: a normal.
    # JAX's truncated_normal truncates at two standard deviations, which leaves one of 0.0176.
    init = layers.normal(0.02)
    return tower_layer.LayerInits(init, init, init, init, mlp_bias=lambda fan_in: layers.zeros)


class ImageTransformer(towers.ImageTower):
    """Images to tokens: the class token first (if there is one), then registers, then patches row by row.

    Parameters belong to images of `image_size`. For one of another size, learned positions are resized to its
    grid, and rotary ones are computed for it.
    """

    any_size = True
    takes_kept = True

    @classmethod
    def leading_tokens(cls, config: config_lib.ImageTower) -> int:
        """The class token and the registers (Darcet et al. 2024)."""
        return int(config.class_token) + config.registers

    @nn.compact
    def __call__(self, image: jax.Array, *, values: bool = False, kept: jax.Array | None = None) -> jax.Array:
        """Normalised images to tokens. Raises UserError: an image is no square of whole patches.

        Args:
          image: [B, S, S, 3].
          values: each token attends to itself alone in the last layer: its value goes through the output map,
            and residual, MLP and norm follow as ever (MaskCLIP, Zhou et al. 2022, arXiv 2112.01071).
          kept: int32 [B, n], the numbers of the patches that are there; None: all.

        Returns:
          [B, N, E], after the final norm.
        """
        t = self.config
        _, height, width, _ = image.shape
        grid = height // t.patch_size
        if height != width or not grid or height % t.patch_size:
            raise errors.UserError(
                f"image: got {height} x {width} pixels, expected a square of whole patches of"
                f" model.image.patch_size = {t.patch_size}"
            )
        x = of_pixels(image.astype(self.dtype), t.patch_size)
        if kept is not None:
            x = jnp.take_along_axis(x, kept[..., None], axis=1)
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
        x = self._with_leading(x, grid, kept)
        if t.pre_norm:
            x = layers.LayerNorm(t.norm_eps, name="pre_norm")(x)
        x = placement.by_batch(x)
        program, mask, rotation = "xla", None, None
        if values:
            alone = jnp.eye(x.shape[1], dtype=bool)
            mask = jnp.stack([jnp.ones_like(alone)] * (t.depth - 1) + [alone])[:, None, None]
        else:
            program = attention.choose(self.attention, self.dtype, t.heads)
        length = x.shape[1]
        extra = attention.filled(length, program, 2) - length
        if extra:
            x, mask = jnp.pad(x, ((0, 0), (0, extra), (0, 0))), attention.First(length)
        if t.rope != "none":
            trained_grid = t.rope_grid if t.rope == "indices" else 0
            sizes = dict(head_dim=t.width // t.heads, leading=self.leading_tokens(t), trailing=extra)
            rotation = rotary.of_grid(grid, theta=t.rope_theta, kept=kept, trained_grid=trained_grid, **sizes)
        blocks = layers.scan_layers(
            tower_layer.TowerLayer,
            t.depth,
            remat=self.remat,
            unroll=layers.unrolled(t, self.remat, program),
            in_axes=(0 if values else nn.broadcast, nn.broadcast),
        )(
            t,
            self.dtype,
            _inits(t),
            program,
            t.qk_norm,
            key_bias=t.key_bias,
            gated=t.mlp == "gated",
            layer_scale=t.layer_scale,
            lora=self.lora,
            name="blocks",
        )
        x, _ = blocks(x, mask, rotation)
        return layers.LayerNorm(t.norm_eps, name="norm")(x)[:, :length]

    @nn.nowrap
    def _with_leading(self, x: jax.Array, grid: int, kept: jax.Array | None) -> jax.Array:
        """Patches [B, P, E] -> [B, N, E]: with learned positions, the class token and the registers."""
        t, own_grid = self.config, self.config.image_size // self.config.patch_size
        first = int(t.class_token)
        as_tokens = lambda rows: jnp.broadcast_to(rows, (x.shape[0], *rows.shape))
        if t.class_token:
            init = layers.normal(1e-6)
            token = layers.parameter(self, "class_token", init, ("vector",), (t.width,))
            x = jnp.concatenate([as_tokens(token[None]).astype(self.dtype), x], axis=1)

        def init_positions(key, shape, dtype=jnp.float32):
            if t.position_init == "normal":
                return layers.normal(0.02)(key, shape, dtype)
            waves = jnp.asarray(sincos2d(own_grid, t.width, t.position_period), dtype)
            return jnp.pad(waves, ((first, 0), (0, 0)))

        if t.positions:
            shape, axes = (first + own_grid**2, t.width), ("positions", "width")
            positions = layers.parameter(self, "position_embed", init_positions, axes, shape)
            if grid != own_grid:
                positions = resized_positions(positions, first, grid)
            positions = positions[None]
            if kept is not None:
                (positions,) = placement.whole(positions)
                of_patches = of_kept(positions[first:], kept)
                positions = jnp.concatenate([as_tokens(positions[:first]), of_patches], axis=1)
            x = x + positions.astype(self.dtype)
        if t.registers:
            shape, axes = (t.registers, t.width), ("positions", "width")
            registers = layers.parameter(self, "registers", layers.normal(0.02), axes, shape)
            registers = as_tokens(registers).astype(self.dtype)
            x = jnp.concatenate([x[:, :first], registers, x[:, first:]], axis=1)
        return x
