"""Building blocks of the towers and the region decoder: dense layers, norms, attention, MLP, the layer scan.

Every parameter names its logical axes (`config.sharding` maps them to mesh axes). Parameters are
float32; activations have the module's `dtype`; softmax and norm statistics are float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from grain_jax.config import ImageTower, TextTower
from grain_jax.models import attention, placement, programs, rotary

Init: TypeAlias = Callable[..., Any]
zeros = nn.initializers.zeros_init()
normal = nn.initializers.normal
# The initial weights of torch.nn.Linear and torch.nn.Conv2d: uniform in +- fan_in ** -0.5.
torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int) -> Init:
    """The initial biases of torch.nn.Linear and torch.nn.Conv2d: uniform in +- fan_in ** -0.5."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def _gelu(x):
    """The exact GELU of an array of any shape, computed in float32 with erf, as in torch."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
    "relu": nn.relu,
}


def parameter(
    module: nn.Module, name: str, init: Init, axes: tuple[str, ...], shape: tuple[int, ...]
) -> jax.Array:
    """A parameter of `module`, float32 of that shape, with its logical axes."""
    # Flax types what the initialiser makes, the box with the axes; `param` returns what is in the box.
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape))


def dense(
    features: int | tuple[int, ...],
    in_axes: tuple[str, ...],
    out_axes: tuple[str, ...],
    *,
    dtype: np.dtype,
    kernel_init: Init,
    bias_init: Init = zeros,
    use_bias: bool = True,
    name: str | None = None,
) -> nn.DenseGeneral:
    """A linear map over the trailing `len(in_axes)` axes, to trailing axes of the sizes `features`, in `dtype`.

    `in_axes` and `out_axes` are logical axes. Without a `name` it has that of the attribute that it is assigned to.
    """
    features = features if isinstance(features, tuple) else (features,)
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-len(in_axes), 0)),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, (*in_axes, *out_axes)),
        # A bias is small: it is sharded along heads and mlp with its kernel, never along the width.
        bias_init=nn.with_logical_partitioning(
            bias_init, tuple("vector" if a in ("width", "embed") else a for a in out_axes)
        ),
        name=name,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return _norm_forward(x, scale, bias, eps)[0]


def _norm_forward(x, scale, bias, eps):
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, -1)
    centred = y - mean[..., None]
    # Not E[x^2] - E[x]^2, which loses digits that parity with torch needs.
    rstd = jax.lax.rsqrt(jnp.mean(centred * centred, -1) + eps)
    y = centred * (rstd[..., None] * scale) + bias
    return y.astype(x.dtype), (x, scale, mean, rstd)


def _norm_backward(eps, residuals, dy):
    x, scale, mean, rstd = residuals
    dy = dy.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean[..., None]) * rstd[..., None]
    d = dy * scale
    d = d - jnp.mean(d, -1, keepdims=True) - normed * jnp.mean(d * normed, -1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    dx = (d * rstd[..., None]).astype(x.dtype)
    return dx, jnp.sum(dy * normed, rows), jnp.sum(dy, rows)


_norm.defvjp(_norm_forward, _norm_backward)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, [..., E] -> [..., E]; computed in float32, returned in the dtype of the input.

    The backward pass keeps the input and two numbers a row. JAX's own derivative keeps three float32 arrays of
    the input's shape, more than half of all that a bfloat16 block keeps.
    """

    eps: float

    def __call__(self, x: jax.Array) -> jax.Array:
        return _norm(x, *self.parameters(x.shape[-1]), self.eps)

    @nn.compact
    def parameters(self, features: int) -> tuple[jax.Array, jax.Array]:
        """(scale, bias), float32 [features] each, for a program that has the norm inside."""
        ones = nn.initializers.ones_init()
        return (
            parameter(self, "scale", ones, ("vector",), (features,)),
            parameter(self, "bias", zeros, ("vector",), (features,)),
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(logits, dtype):
    """Softmax over the last axis: float32 logits [..., L] -> weights [..., L] of `dtype`.

    The backward pass keeps the weights alone.
    """
    return nn.softmax(logits).astype(dtype)


def _softmax_forward(logits, dtype):
    weights = softmax(logits, dtype)
    return weights, weights


def _softmax_backward(dtype, weights, d):
    weights, d = weights.astype(jnp.float32), d.astype(jnp.float32)
    d = weights * d
    return (d - weights * jnp.sum(d, -1, keepdims=True),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def example_dropout(x, keys, site: int, rate: float):
    """Dropout whose mask depends on the key of the example, not on its place in the batch.

    Args:
      x: [B, ...].
      keys: PRNG keys [B], or None for no dropout.
      site: a number that differs between the dropouts of a layer.
      rate: probability that a value is dropped, in [0, 1).
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(
        lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape[1:])
    )(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention, optionally with LayerNorm and then rotary positions on the queries and keys of each head."""

    width: int
    heads: int
    dtype: np.dtype
    kernel_init: Init
    out_init: Init
    bias_init: Init = zeros
    qk_norm_eps: float | None = None
    dropout: float = 0.0
    program: str = "xla"  # "pallas" and "cudnn" serve self-attention without dropout (attention.py)
    rope: rotary.Rope | None = None  # of self-attention
    key_bias: bool = True

    @nn.compact
    def __call__(
        self,
        query,
        key,
        value,
        mask=None,
        dropout_keys=None,
        site: int = 0,
        alone=None,
        kept: jax.Array | None = None,
    ):
        """Attention of `query` to `key` and `value`.

        Args:
          query: [B, Lq, E].
          key: [B, Lk, E*].
          value: as `key`.
          mask: bool broadcastable to [B, K, Lq, Lk], or an attention.Mask where `program` is not "xla". One query [B, 1, E]
            with a mask of Lq > 1 is the query of them all.
          dropout_keys: see `example_dropout`.
          site: see `example_dropout`.
          alone: bool [], whether each position attends to itself alone; None: no. Of self-attention by "xla".
          kept: of `rope`, int32 [B, n], the numbers of the patches that are there; None: all.

        Returns:
          [B, Lq, E].
        """
        head_dim = self.width // self.heads
        if self.program == "pallas":
            return self._heads_side_by_side(query, mask, kept)
        project = lambda name, x: dense(
            (self.heads, head_dim),
            ("width",),
            ("heads", "head_dim"),
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            use_bias=name != "key" or self.key_bias,
            name=name,
        )(x)
        q = project("query", query)  # [B, Lq, K, head_dim]
        k = project("key", key)
        v = project("value", value)
        q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
        q, k = self._normed_and_rotated(kept, q, k)
        if self.program == "cudnn":
            out = attention.with_cudnn(q, k, v, mask)
        else:
            logits = jnp.einsum(
                "bqkh,bskh->bkqs", q * head_dim**-0.5, k, preferred_element_type=jnp.float32
            )
            if mask is not None:
                logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
            weights = softmax(logits, self.dtype)  # [B, K, Lq, Lk]
            weights = example_dropout(weights, dropout_keys, site, self.dropout)
            out = jnp.einsum("bkqs,bskh->bqkh", weights, v)
            if alone is not None:
                out = jnp.where(alone, v, out)
        return dense(
            self.width,
            ("heads", "head_dim"),
            ("width",),
            dtype=self.dtype,
            kernel_init=self.out_init,
            bias_init=self.bias_init,
            name="out",
        )(out)

    @nn.nowrap
    def _normed_and_rotated(self, kept, *queries_and_keys: jax.Array) -> list[jax.Array]:
        """Queries and keys [B, L, K, head_dim] as their product takes them."""
        out = []
        for name, x in zip(("query_norm", "key_norm"), queries_and_keys, strict=True):
            if self.qk_norm_eps is not None:
                x = LayerNorm(self.qk_norm_eps, name=name)(x)
            out.append(x if self.rope is None else self.rope.rotate(x, kept))
        return out

    def _heads_side_by_side(self, x: jax.Array, within, kept) -> jax.Array:
        """Self-attention by the kernel: the same parameters, activations [B, L, E] with the heads side by side.

        A head has fewer than the 128 lanes of a TPU register: as an axis of its own it would be padded to them.
        """
        from grain_jax.models import attention_kernel  # a fifth of a second to import

        heads, head_dim = self.heads, self.width // self.heads
        side_by_side = lambda name, **options: SideBySide(
            self.width, heads, self.dtype, bias_init=self.bias_init, name=name, **options
        )
        maps = [
            side_by_side(name, kernel_init=self.kernel_init, use_bias=use_bias)
            for name, use_bias in (("query", True), ("key", self.key_bias), ("value", True))
        ]
        together = attention_kernel.arranges(heads, head_dim) and not programs.are_apart()
        if together:  # one product reads x once
            kernel, bias = (
                attention_kernel.arranged(q, k, v, heads)
                for q, k, v in zip(*(one.parameters() for one in maps))
            )
            qkv = [maps[0].product(x, kernel, bias)]
        else:
            qkv = [one(x) for one in maps]
        qkv = [checkpoint_name(one, "qkv") for one in qkv]
        norms, eps = None, self.qk_norm_eps
        if self.rope is not None:  # it follows the norm, which is inside the kernel without it
            q, k, v = attention_kernel.apart(qkv[0], heads) if together else qkv
            split = lambda x: x.reshape(*x.shape[:2], heads, head_dim)
            q, k = (y.reshape(x.shape) for y in self._normed_and_rotated(kept, split(q), split(k)))
            qkv, eps = [q, k, v], None
        elif eps is not None:
            norms = tuple(
                part
                for name in ("query_norm", "key_norm")
                for part in LayerNorm(eps, name=name).parameters(head_dim)
            )
        out = attention.with_pallas(*qkv, heads=heads, norms=norms, eps=eps, within=within)
        return side_by_side("out", kernel_init=self.out_init, back=True)(out)


class SideBySide(nn.Module):
    """`dense` to or from (heads, head_dim) whose activations have the heads side by side, [..., E] -> [..., E]."""

    width: int  # E, of the input and the output
    heads: int  # their number
    dtype: np.dtype  # of the product and the output
    kernel_init: Init  # initialiser of the kernel, as of `dense`
    bias_init: Init  # initialiser of the bias
    back: bool = False  # the map that follows the heads, from them to the width
    use_bias: bool = True  # of the map to the heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., E] -> [..., E]."""
        return self.product(x, *self.parameters())

    @nn.nowrap
    def product(self, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        """[..., E] -> [..., E*], by a matrix and a bias of the dtype."""
        return jnp.einsum("...e,ef->...f", x.astype(self.dtype), kernel) + bias

    @nn.compact
    def parameters(self) -> tuple[jax.Array, jax.Array]:
        """(matrix [E, E], bias [E]) of the dtype, for a product with others."""
        width, of_heads = self.width, (self.heads, self.width // self.heads)
        shape = (*of_heads, width) if self.back else (width, *of_heads)
        axes = ("heads", "head_dim", "width") if self.back else ("width", "heads", "head_dim")

        def as_matrix(init, matrix):  # nn.DenseGeneral draws a matrix, too
            return lambda key, shape, dtype=jnp.float32: init(key, matrix, dtype).reshape(shape)

        kernel = parameter(self, "kernel", as_matrix(self.kernel_init, (width, width)), axes, shape)
        if self.back:
            bias = parameter(self, "bias", self.bias_init, ("vector",), (width,))
        elif self.use_bias:
            bias = parameter(self, "bias", as_matrix(self.bias_init, (width,)), axes[1:], of_heads)
        else:
            bias = jnp.zeros(width)
        return kernel.reshape(width, width).astype(self.dtype), bias.reshape(-1).astype(self.dtype)


class MLP(nn.Module):
    """Two dense layers with an activation between; `gated`: the activation of a third one times the first (SwiGLU)."""

    width: int
    mlp_dim: int
    activation: str
    dtype: np.dtype
    in_init: Init
    out_init: Init
    in_bias_init: Init = zeros
    out_bias_init: Init = zeros
    dropout: float = 0.0
    gated: bool = False

    @nn.compact
    def __call__(self, x, dropout_keys=None, site: int = 0):
        """[B, L, E] -> [B, L, E]."""
        hidden = [
            dense(
                self.mlp_dim,
                ("width",),
                ("mlp",),
                dtype=self.dtype,
                kernel_init=self.in_init,
                bias_init=self.in_bias_init,
                name=name,
            )(x)
            for name in (("in", "gate") if self.gated else ("in",))
        ]

        def from_hidden(module, x, *gate):
            activated = ACTIVATIONS[module.activation](*gate or (x,))
            if gate:
                activated = activated * x
            x = example_dropout(activated, dropout_keys, site, module.dropout)
            return dense(
                module.width,
                ("mlp",),
                ("width",),
                dtype=module.dtype,
                kernel_init=module.out_init,
                bias_init=module.out_bias_init,
                name="out",
            )(x)

        # [B, L, mlp_dim] is the widest array. The backward pass keeps it before the activation only and
        # computes the activation again; JAX's derivative of the exact GELU keeps three more arrays of its size.
        return nn.remat(from_hidden, prevent_cse=False)(self, *hidden)


class FusedMLP(nn.Module):
    """LayerNorm, `MLP` and residual by a kernel (mlp_kernel.py): x -> x + MLP(LayerNorm(x)); the parameters of `MLP`."""

    width: int
    mlp_dim: int
    activation: str
    in_init: Init
    out_init: Init
    in_bias_init: Init
    out_bias_init: Init

    @nn.compact
    def __call__(self, x: jax.Array, norm: tuple[jax.Array, jax.Array], eps: float) -> jax.Array:
        """[B, L, E] -> [B, L, E]; `norm` has scale and bias, float32 [E]."""
        from grain_jax.models import mlp_kernel  # a fifth of a second to import

        w_in, b_in = Affine(
            (self.width, self.mlp_dim), ("width", "mlp"), self.in_init, self.in_bias_init, name="in"
        )()
        w_out, b_out = Affine(
            (self.mlp_dim, self.width),
            ("mlp", "width"),
            self.out_init,
            self.out_bias_init,
            name="out",
        )()
        weights = dict(w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out)
        return mlp_kernel.half_layer(
            x,
            scale=norm[0],
            bias=norm[1],
            eps=eps,
            activation=ACTIVATIONS[self.activation],
            **weights,
        )


class Affine(nn.Module):
    """The parameters of `dense` between two axes, for a program that has the product inside."""

    shape: tuple[int, int]
    axes: tuple[str, str]  # logical axes
    kernel_init: Init
    bias_init: Init

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """(kernel, bias), float32."""
        kernel = parameter(self, "kernel", self.kernel_init, self.axes, self.shape)
        axis = "vector" if self.axes[1] == "width" else self.axes[1]
        return kernel, parameter(self, "bias", self.bias_init, (axis,), self.shape[1:])


class LayerInits(NamedTuple):
    """Initialisers of a `TowerLayer`; those of biases are functions of the size of the input."""

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
    mlp_program: str = "xla"  # or "pallas", of the half with the MLP (`programs.of_mlp`)
    qk_norm: bool = False  # whether the queries and keys of each head have a LayerNorm
    rope: rotary.Rope | None = None  # rotary positions
    key_bias: bool = True  # whether the projection to the keys has a bias
    gated: bool = False  # whether the MLP is gated
    layer_scale: bool = False  # whether there is layer scale

    @nn.compact
    def __call__(self, x, mask=None, alone=None, kept=None):
        """x [B, L, E], mask, alone and kept as of `Attention` -> (carry [B, L, E], no per-layer output)."""
        t, inits = self.tower, self.inits
        y = LayerNorm(t.norm_eps, name="norm_1")(x)
        y = Attention(
            t.width,
            t.heads,
            self.dtype,
            kernel_init=inits.qkv,
            out_init=inits.attention_out,
            bias_init=inits.attention_bias(t.width),
            qk_norm_eps=t.norm_eps if self.qk_norm else None,
            program=self.program,
            rope=self.rope,
            key_bias=self.key_bias,
            name="attention",
        )(y, y, y, mask, alone=alone, kept=kept)
        x = x + self._scaled("layer_scale_1", y)
        norm = LayerNorm(t.norm_eps, name="norm_2")
        of_mlp: dict[str, Any] = dict(
            in_init=inits.mlp_in,
            out_init=inits.mlp_out,
            in_bias_init=inits.mlp_bias(t.width),
            out_bias_init=inits.mlp_bias(t.mlp_dim),
            name="mlp",
        )
        if self.mlp_program == "pallas":
            fused = FusedMLP(t.width, t.mlp_dim, t.activation, **of_mlp)
            return placement.by_batch(fused(x, norm.parameters(t.width), t.norm_eps)), None
        mlp = MLP(t.width, t.mlp_dim, t.activation, self.dtype, gated=self.gated, **of_mlp)
        y = mlp(norm(x))
        return placement.by_batch(x + self._scaled("layer_scale_2", y)), None

    @nn.nowrap
    def _scaled(self, name: str, x: jax.Array) -> jax.Array:
        if not self.layer_scale:
            return x
        init = nn.initializers.constant(1e-5)
        return x * parameter(self, name, init, ("vector",), (x.shape[-1],)).astype(x.dtype)


class AttentionPool(nn.Module):
    """One learned query attends to all tokens: the MAP head of SigLIP and big_vision (Zhai et al. 2022)."""

    tower: ImageTower | TextTower  # whose width, heads, MLP, activation and norm are the pool's
    dtype: np.dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        read: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Normed tokens [B, L, E] -> [B, E].

        With a mask, bool [B, 1, n, L], it pools n times, each time the tokens where its line is true, and returns those that
        `read` takes of them, [B, n, E] -> [..., E].
        """
        t = self.tower
        xavier = nn.initializers.xavier_uniform()
        probe = parameter(self, "probe", normal(0.02), ("vector",), (t.width,))
        probe = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, t.width))
        attend = Attention(t.width, t.heads, self.dtype, xavier, xavier, name="attention")
        x = attend(probe, x, x, mask)
        if read is not None:
            x = read(x)
        y = LayerNorm(t.norm_eps, name="norm")(x)
        mlp = MLP(t.width, t.mlp_dim, t.activation, self.dtype, xavier, xavier, name="mlp")
        x = x + mlp(y)
        return x[:, 0] if read is None else x


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "qkv": jax.checkpoint_policies.save_only_these_names("qkv"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan_layers(
    block: type[nn.Module], depth: int, *, remat: str, unroll: int, in_axes: tuple[Any, ...]
) -> Callable[..., nn.Module]:
    """`depth` blocks as one scan: a module whose parameters are stacked on a leading "layers" axis.

    Args:
      block: module with `__call__(carry, *inputs) -> (carry, per-layer output)`.
      depth: number of blocks.
      remat: "none", or what the backward pass keeps, a key of `REMAT`.
      unroll: blocks in one iteration of the loop.
      in_axes: for each input, 0 (scanned over layers) or nn.broadcast.
    """
    if remat != "none":
        block = nn.remat(block, policy=REMAT[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=cast(Any, in_axes),  # typed as one int; one a input is documented
        length=depth,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
