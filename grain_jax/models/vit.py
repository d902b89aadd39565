"""The image tower "vit": a vision transformer whose tokens all go to the region decoder (docs/method.md, Model).

Its options also make it the tower of CLIP or SigLIP, whose tokens a model without a decoder pools, of DINOv3 and of
PE-core (`recipe.FAMILIES`), and of TIPS v2: a class token, `registers=1` (its second class token) and `layer_scale`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.core import errors, schema
from grain_jax.models import attention, layers, placement, programs, rotary, towers
from grain_jax.models import places as places_lib
from grain_jax.models.places import Places


def sincos2d(grid: int, width: int, period: float) -> np.ndarray:
    """Sine-cosine position features of a square grid, float32 [grid * grid, width] (as in MoCo v3, period 1e4).

    Wavelengths go from 2 pi patches to `period` times that: with 1e4 most are constant over a small grid.
    """
    omega = period ** -(np.arange(width // 4) / (width // 4))
    y, x = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    out = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return np.pad(out, ((0, 0), (0, width - out.shape[1]))).astype(np.float32)


def resized_positions(positions: jax.Array, leading: int, grid: int) -> jax.Array:
    """Learned positions [N, E] for `grid` x `grid` patches, bilinear, antialiased where it shrinks.

    Torch has it as `interpolate` with `mode="bilinear"` and `antialias=True`. The first `leading` positions stay.
    """
    positions = placement.whole(positions)
    own, width = positions[leading:], positions.shape[1]
    side = round(len(own) ** 0.5)
    square = jax.image.resize(own.reshape(side, side, width), (grid, grid, width), "bilinear")
    return jnp.concatenate([positions[:leading], square.reshape(-1, width)])


def positions_at(positions: jax.Array, places: Places) -> jax.Array:
    """Learned positions of a square [side * side, E], resized as above to the grid of each image: float32 [B, P, E].

    Rows and columns have weights of their own, as in SigLIP 2 (Tschannen et al. 2025). Their products, [B, P, side * side],
    are smaller than a grid of rows that may be as long as P; the backward pass makes them again.
    """
    # For a square that lacks some patches a gather of rows would do; its gradient is a scatter of B P rows. By the
    # compiler's estimate for a v5e both products take 0.45 ms for 128 images of 98 patches of B/16.
    side = round(len(positions) ** 0.5)

    def resized(positions, yx, grid):
        of_axis = lambda axis: _resize_weights(yx[..., axis], grid[:, axis, None], side)
        weights = of_axis(0)[..., None] * of_axis(1)[:, :, None]
        weights = weights.reshape(*yx.shape[:2], -1)
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("bps,se->bpe", weights, positions, precision=highest)

    return jax.checkpoint(resized)(positions, places.yx, places.grid)


def _resize_weights(at: jax.Array, size: jax.Array, side: int) -> jax.Array:
    """The shares of `side` cells in the cells at [B, P] of lines of size [B, 1] each: [B, P, side]."""
    step = side / jnp.maximum(size, 1).astype(jnp.float32)
    centres = ((at + 0.5) * step)[..., None]
    distance = jnp.abs(np.arange(side) + 0.5 - centres)
    hats = jnp.maximum(0, 1 - distance / jnp.maximum(step, 1)[..., None])
    return hats / hats.sum(-1, keepdims=True)


def _inits(tower: config_lib.ImageTower) -> layers.LayerInits:
    if tower.block_init == "torch":  # quirk 13: the reference builds its layers anew after timm's
        init = layers.torch_linear
        return layers.LayerInits(init, init, init, init, attention_bias=layers.torch_bias)
    # timm's trunc_normal_(std=0.02) truncates at -2 and 2, which is 100 standard deviations: a normal.
    # JAX's truncated_normal truncates at two standard deviations, which leaves one of 0.0176.
    init = layers.normal(0.02)
    return layers.LayerInits(init, init, init, init, mlp_bias=lambda fan_in: layers.zeros)


class ImageTransformer(towers.ImageTower):
    """Images to tokens: the class token first (if there is one), then registers, then patches row by row.

    Parameters are those of images of `image_size`. Of an image of another size or shape the learned positions are resized
    to its grid, as SigLIP 2 does (Tschannen et al. 2025), and rotary ones are those of its grid.
    """

    any_size = True
    maskable = True
    any_grid = True

    @classmethod
    def leading_tokens(cls, config: config_lib.ImageTower) -> int:
        """The class token and the registers (Darcet et al. 2024)."""
        return int(config.class_token) + config.registers

    @nn.compact
    def __call__(
        self,
        image: jax.Array | schema.Patches,
        masked: tuple[jax.Array, jax.Array] | None = None,
        *,
        values: bool = False,
        kept: jax.Array | None = None,
    ) -> jax.Array:
        """Normalised images to tokens. Raises UserError: an image is no square of whole patches.

        Args:
          image: [B, S, S, 3]; or Patches, of any grid.
          masked: (bool [B, P], float [E]): the embeddings of these patches are replaced by this one, before positions.
          values: each token attends to itself alone in the last layer: its value goes through the output map, and
            residual, MLP and norm follow as ever (MaskCLIP, Zhou et al. 2022, arXiv 2112.01071).
          kept: int32 [B, n], the numbers of the patches that are there, padding last; None: all.

        Returns:
          [B, N, E], after the final norm; of tokens that are not real, anything.
        """
        t = self.config
        places = places_lib.of_images(image, t.patch_size, kept)
        x, grid = self._pixels(image)
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
        if masked is not None:
            where, token = masked
            if kept is not None:
                where = jnp.take_along_axis(where, kept, axis=1)
            x = jnp.where(where[..., None], token.astype(self.dtype), x)
        x = self._with_leading(x, grid, places)
        if t.pre_norm:
            x = layers.LayerNorm(t.norm_eps, name="pre_norm")(x)
        x = placement.by_batch(x)
        program = "xla" if values else attention.choose(self.attention, self.dtype, t.heads)
        mlp = "xla"
        if not values:
            mlp = programs.of_mlp(self.mlp, self.dtype, t, length=x.shape[1], remat=self.remat)
        leading = self.leading_tokens(t)
        rope = rotary.of_tower(t, leading, 0 if places is not None else grid)
        inputs = self._inputs(image, places, rope, x.shape[1], program, values)
        blocks = layers.scan_layers(
            layers.TowerLayer,
            t.depth,
            remat=self.remat,
            unroll=programs.unrolled(t, self.remat, program, mlp),
            in_axes=(nn.broadcast, 0 if values else nn.broadcast, nn.broadcast)[: len(inputs)],
        )(
            t,
            self.dtype,
            _inits(t),
            program,
            mlp,
            t.qk_norm,
            rope=rope,
            key_bias=t.key_bias,
            gated=t.mlp == "gated",
            layer_scale=t.layer_scale_init if t.layer_scale else None,
            name="blocks",
        )
        x, _ = blocks(x, *inputs)
        return layers.LayerNorm(t.norm_eps, name="norm")(x)

    @nn.nowrap
    def _pixels(self, image: jax.Array | schema.Patches) -> tuple[jax.Array, int]:
        """The pixels of all patches, [B, P, p*p*3], and how many a side of the square has; 0 of Patches."""
        if isinstance(image, schema.Patches):
            return image.pixels.astype(self.dtype), 0
        patch = self.config.patch_size
        _, height, width, _ = image.shape
        grid = height // patch
        if height != width or not grid or height % patch:
            raise errors.UserError(
                f"image: got {height} x {width} pixels, expected a square of whole patches of"
                f" model.image.patch_size = {patch}"
            )
        return places_lib.of_pixels(image.astype(self.dtype), patch), grid

    @nn.nowrap
    def _inputs(self, image, places, rope, tokens: int, program: str, values: bool) -> tuple:
        """What the layers have as input beside the tokens: mask, where `values` are read, rotary positions."""
        t = self.config
        last = jnp.arange(t.depth) == t.depth - 1 if values else None
        if places is None:  # without `values` there is none, and the program is that of training
            return (None, last) if values else ()
        mask, turns = None, None
        if isinstance(image, schema.Patches):
            mask = attention.of_real(places_lib.real(places, tokens), program)
        if rope is not None:
            turns = rope.turns(places, t.width // t.heads)
        return mask, last, turns

    @nn.nowrap
    def _with_leading(self, x: jax.Array, grid: int, places: Places | None) -> jax.Array:
        """Patches [B, P, E] -> [B, N, E]: with learned positions and the leading tokens."""
        t = self.config
        as_tokens = lambda rows, count: jnp.broadcast_to(rows, (x.shape[0], count, t.width)).astype(
            self.dtype
        )
        own_grid = t.image_size // t.patch_size
        token, positions = None, None
        if t.class_token:
            token = layers.parameter(
                self, "class_token", layers.normal(1e-6), ("vector",), (t.width,)
            )

        def init_positions(key, shape, dtype=jnp.float32):
            if t.position_init == "normal":
                return layers.normal(0.02)(key, shape, dtype)
            return jnp.pad(
                jnp.asarray(sincos2d(own_grid, t.width, t.position_period), dtype),
                ((int(t.class_token), 0), (0, 0)),
            )

        if t.positions:
            shape = (t.class_token + own_grid**2, t.width)
            positions = layers.parameter(
                self, "position_embed", init_positions, ("positions", "width"), shape
            )
            own = int(t.class_token)
            if places is not None:
                positions = placement.whole(positions)
                first = jnp.broadcast_to(positions[:own], (x.shape[0], own, t.width))
                rest = positions_at(positions[own:], places)
                positions = jnp.concatenate([first, rest], axis=1)
            elif grid != own_grid:
                positions = resized_positions(positions, own, grid)
        if token is not None:
            x = jnp.concatenate([as_tokens(token, 1), x], axis=1)
        if positions is not None:
            x = x + (positions if places is not None else positions[None]).astype(self.dtype)
        if t.registers:
            shape = (t.registers, t.width)
            rows = layers.parameter(
                self, "registers", layers.normal(0.02), ("positions", "width"), shape
            )
            own = int(t.class_token)
            x = jnp.concatenate([x[:, :own], as_tokens(rows, t.registers), x[:, own:]], axis=1)
        return x
