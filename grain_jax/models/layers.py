"""Building blocks that the three towers share: dense layers, norms, attention, MLP, the layer scan.

Every parameter names its logical axes (`config.sharding` maps them to mesh axes). Parameters are
float32; activations have the module's `dtype`; softmax and norm statistics are float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Init = Callable
zeros = nn.initializers.zeros_init()
normal = nn.initializers.normal
# What torch.nn.Linear and torch.nn.Conv2d start from: uniform in +- fan_in ** -0.5.
torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int) -> Init:
    """What the biases of torch.nn.Linear and torch.nn.Conv2d start from: uniform in +- fan_in ** -0.5."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def _gelu(x):
    """The exact GELU, any shape; in float32 inside, by erf as torch's."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
}


def dense(
    features, in_axes, out_axes, *, dtype, kernel_init, bias_init=zeros, use_bias=True, name=None
):
    """A linear map over the trailing `len(in_axes)` axes; `features` and `out_axes` may be tuples."""
    features = features if isinstance(features, tuple) else (features,)
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-len(in_axes), 0)),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, (*in_axes, *out_axes)),
        # A bias is small: it is cut along heads and mlp with its kernel, never along the width.
        bias_init=nn.with_logical_partitioning(
            bias_init, tuple("vector" if a in ("width", "embed") else a for a in out_axes)
        ),
        name=name,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x, scale, bias, eps):
    return _norm_forward(x, scale, bias, eps)[0]


def _norm_forward(x, scale, bias, eps):
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, -1)
    centred = y - mean[..., None]
    # Not E[x^2] - E[x]^2, which loses digits that parity with torch needs.
    rstd = jax.lax.rsqrt(jnp.mean(centred * centred, -1) + eps)
    y = centred * (rstd[..., None] * scale) + bias
    return y.astype(x.dtype), (x, scale, mean, rstd)


def _norm_backward(eps, kept, dy):
    x, scale, mean, rstd = kept
    dy = dy.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean[..., None]) * rstd[..., None]
    d = dy * scale
    d = d - jnp.mean(d, -1, keepdims=True) - normed * jnp.mean(d * normed, -1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    dx = (d * rstd[..., None]).astype(x.dtype)
    return dx, jnp.sum(dy * normed, rows), jnp.sum(dy, rows)


_norm.defvjp(_norm_forward, _norm_backward)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, [..., E] to the same: float32 inside, the input's dtype outside.

    For the backward pass it keeps its input and two numbers a row; derived by JAX, it keeps three float32
    arrays of its input's shape, more than half of what a bfloat16 block keeps at all.
    """

    eps: float

    @nn.compact
    def __call__(self, x):
        param = lambda name, init: self.param(  # noqa: E731
            name, nn.with_logical_partitioning(init, ("vector",)), (x.shape[-1],)
        )
        return _norm(x, param("scale", nn.initializers.ones_init()), param("bias", zeros), self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(logits, dtype):
    """Over the last axis, float32 logits [..., L] to weights [..., L] of `dtype`: the one array kept for the backward pass."""
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
    """Dropout whose mask is a function of each example's own key, not of its place in the batch.

    Args:
      x: [B, ...].
      keys: PRNG keys [B], or None for no dropout.
      site: a number that tells this dropout from the others of the layer.
      rate: chance that a value is dropped.
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(
        lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape[1:])
    )(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention, optionally with LayerNorm on each head's queries and keys."""

    width: int
    heads: int
    dtype: jnp.dtype
    kernel_init: Init
    out_init: Init
    bias_init: Init = zeros
    qk_norm_eps: float | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, query, key, value, mask=None, dropout_keys=None, site: int = 0):
        """query [B, Lq, E], key and value [B, Lk, E*], mask bool broadcastable to [B, K, Lq, Lk] -> [B, Lq, E]."""
        head_dim = self.width // self.heads
        project = lambda name, x: dense(  # noqa: E731
            (self.heads, head_dim),
            ("width",),
            ("heads", "head_dim"),
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name=name,
        )(x)
        q = project("query", query)  # [B, Lq, K, head_dim]
        k = project("key", key)
        v = project("value", value)
        q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
        if self.qk_norm_eps is not None:
            q = LayerNorm(self.qk_norm_eps, name="query_norm")(q)
            k = LayerNorm(self.qk_norm_eps, name="key_norm")(k)
        logits = jnp.einsum(
            "bqkh,bskh->bkqs", q * head_dim**-0.5, k, preferred_element_type=jnp.float32
        )
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        weights = softmax(logits, self.dtype)  # [B, K, Lq, Lk]
        weights = example_dropout(weights, dropout_keys, site, self.dropout)
        out = jnp.einsum("bkqs,bskh->bqkh", weights, v)
        return dense(
            self.width,
            ("heads", "head_dim"),
            ("width",),
            dtype=self.dtype,
            kernel_init=self.out_init,
            bias_init=self.bias_init,
            name="out",
        )(out)


class MLP(nn.Module):
    """Two dense layers with an activation between."""

    width: int
    mlp_dim: int
    activation: str
    dtype: jnp.dtype
    in_init: Init
    out_init: Init
    in_bias_init: Init = zeros
    out_bias_init: Init = zeros
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, dropout_keys=None, site: int = 0):
        """[B, L, E] -> [B, L, E]."""
        x = dense(
            self.mlp_dim,
            ("width",),
            ("mlp",),
            dtype=self.dtype,
            kernel_init=self.in_init,
            bias_init=self.in_bias_init,
            name="in",
        )(x)

        def from_hidden(module, x):
            x = example_dropout(
                ACTIVATIONS[module.activation](x), dropout_keys, site, module.dropout
            )
            return dense(
                module.width,
                ("mlp",),
                ("width",),
                dtype=module.dtype,
                kernel_init=module.out_init,
                bias_init=module.out_bias_init,
                name="out",
            )(x)

        # [B, L, mlp_dim] is the widest array there is. The backward pass keeps it before the activation only and
        # works the activation out again; JAX's derivative of the exact GELU would keep three more of it.
        return nn.remat(from_hidden, prevent_cse=False)(self, x)


class AttentionPool(nn.Module):
    """One learned query looks at all tokens: SigLIP's and big_vision's MAP head (Zhai et al. 2022).

    Args:
      tower: `config.ImageTower` or `config.TextTower`; its heads, MLP and norm are the head's too.
    """

    tower: Any
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        """Normed tokens [B, L, E] -> [B, E]."""
        t = self.tower
        xavier = nn.initializers.xavier_uniform()
        probe = self.param(
            "probe", nn.with_logical_partitioning(normal(0.02), ("vector",)), (t.width,)
        )
        probe = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, t.width))
        x = Attention(t.width, t.heads, self.dtype, xavier, xavier, name="attention")(probe, x, x)
        y = LayerNorm(t.norm_eps, name="norm")(x)
        mlp = MLP(t.width, t.mlp_dim, t.activation, self.dtype, xavier, xavier, name="mlp")
        return (x + mlp(y))[:, 0]


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "qkv": jax.checkpoint_policies.save_only_these_names("qkv"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan_layers(block: type[nn.Module], depth: int, *, remat: str, unroll: int, in_axes: tuple):
    """`depth` blocks as one scan: parameters are stacked on a leading "layers" axis.

    Args:
      block: module with `__call__(carry, *inputs) -> (carry, per-layer output)`.
      remat: "none", or the name of what the backward pass keeps (`REMAT`).
      unroll: layers without a loop between them.
      in_axes: for each input, 0 (scanned over layers) or nn.broadcast.
    """
    if remat != "none":
        block = nn.remat(block, policy=REMAT[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=depth,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
