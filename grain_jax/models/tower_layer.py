"""The layer of both towers and the pool with a learned query."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.config import ImageTower, TextTower
from grain_jax.models import attention, placement, rotary
from grain_jax.models.layers import MLP, Init, LayerNorm, normal, parameter, torch_bias, zeros


class LayerInits(NamedTuple):
    """Initialisers of a `TowerLayer`; for biases, functions of the size of the input."""

    qkv: Init
    attention_out: Init
    mlp_in: Init
    mlp_out: Init
    attention_bias: Callable[[int], Init] = lambda fan_in: zeros
    mlp_bias: Callable[[int], Init] = torch_bias


class TowerLayer(nn.Module):
    """Pre-norm attention and MLP, each added to its input.

    Layer scale, CaiT's (Touvron et al. 2021): what is added is multiplied by a learned vector.
    """

    tower: ImageTower | TextTower  # has width, heads, mlp_dim, activation and norm_eps
    dtype: np.dtype  # of activations
    inits: LayerInits  # the initialisers
    program: str = "xla"  # as of `Attention`
    qk_norm: bool = False  # whether the queries and keys of each head have a LayerNorm
    key_bias: bool = True  # whether the projection to the keys has a bias
    gated: bool = False  # whether the MLP is gated
    layer_scale: bool = False  # whether there is layer scale
    lora: float = 0.0  # as of `layers.Dense`

    @nn.compact
    def __call__(self, x, mask=None, rotation: rotary.Rotation | None = None):
        """x [B, L, E], mask and rotation as of `Attention` -> (carry [B, L, E], no per-layer output)."""
        t, inits = self.tower, self.inits
        y = LayerNorm(t.norm_eps, name="norm_1")(x)
        y = attention.Attention(
            t.width,
            t.heads,
            self.dtype,
            kernel_init=inits.qkv,
            out_init=inits.attention_out,
            bias_init=inits.attention_bias(t.width),
            qk_norm_eps=t.norm_eps if self.qk_norm else None,
            program=self.program,
            key_bias=self.key_bias,
            lora=self.lora,
            name="attention",
        )(y, y, y, mask, rotation=rotation)
        x = placement.added(x, self._scaled("layer_scale_1", y))
        y = LayerNorm(t.norm_eps, name="norm_2")(x)
        y = MLP(
            t.width,
            t.mlp_dim,
            t.activation,
            self.dtype,
            in_init=inits.mlp_in,
            out_init=inits.mlp_out,
            in_bias_init=inits.mlp_bias(t.width),
            out_bias_init=inits.mlp_bias(t.mlp_dim),
            gated=self.gated,
            lora=self.lora,
            name="mlp",
        )(y)
        return placement.added(x, self._scaled("layer_scale_2", y)), None

    @nn.nowrap
    def _scaled(self, name: str, x: jax.Array) -> jax.Array:
        if not self.layer_scale:
            return x
        init = nn.initializers.constant(1e-5)
        return x * parameter(self, name, init, ("vector",), (x.shape[-1],)).astype(x.dtype)


class AttentionPool(nn.Module):
    """One learned query attends to all tokens: the MAP head of SigLIP and big_vision (Zhai et al. 2022)."""

    tower: ImageTower | TextTower  # whose width, MLP, activation and norm are the pool's
    dtype: np.dtype
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normed tokens [B, L, E] -> [B, E]; with a mask, bool [B, 1, 1, L], only its true tokens count."""
        t, xavier = self.tower, nn.initializers.xavier_uniform()
        probe = parameter(self, "probe", normal(0.02), ("vector",), (t.width,))
        probe = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, t.width))
        attend = attention.Attention(t.width, self.heads, self.dtype, xavier, xavier, name="attention")
        x = attend(probe, x, x, mask)
        y = LayerNorm(t.norm_eps, name="norm")(x)
        mlp = MLP(t.width, t.mlp_dim, t.activation, self.dtype, xavier, xavier, name="mlp")
        return (x + mlp(y))[:, 0]
