"""Building blocks of the towers and the region decoder: dense layers, norms, MLPs (attention: attention.py).

Every parameter names its logical axes (`config.sharding` maps them to mesh axes). Parameters are
float32; activations have the module's `dtype`; softmax and norm statistics are float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import dtypes

from grain_jax.config import ImageTower, RegionDecoder, TextTower
from grain_jax.core import low_rank
from grain_jax.models import placement

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


def bias_axes(out_axes: tuple[str, ...]) -> tuple[str, ...]:
    """The logical axes of a bias. It is sharded along heads and mlp like its kernel, not the width."""
    return tuple("vector" if a in ("width", "embed") else a for a in out_axes)


class Dense(nn.DenseGeneral):
    """A linear map, with what the factors of LoRA beside its kernel add (models/lora.py)."""

    lora: float = 0.0  # alpha / rank; 0: factors are not applied

    def __call__(self, x: jax.Array) -> jax.Array:
        return _with_factors(self, x, super().__call__(x), flat=False)


def _with_factors(module: "Dense | Affine", x: jax.Array, y: jax.Array, flat: bool) -> jax.Array:
    """y, plus (alpha / rank) (x A) B where there are factors; `flat`: inputs, and outputs, are one axis."""
    if not (module.lora and module.has_variable("params", low_rank.A)):
        return y
    a, b = (cast(jax.Array, module.get_variable("params", name)) for name in (low_rank.A, low_rank.B))
    x, a, b = dtypes.promote_dtype(x, a, b * module.lora, dtype=module.dtype)
    if flat:
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)
    return y + jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1)


def dense(
    features: int | tuple[int, ...],
    in_axes: tuple[str, ...],
    out_axes: tuple[str, ...],
    *,
    dtype: np.dtype,
    kernel_init: Init,
    bias_init: Init = zeros,
    use_bias: bool = True,
    lora: float = 0.0,
    name: str | None = None,
) -> Dense:
    """A linear map of the trailing `len(in_axes)` axes to trailing axes of the sizes `features`, in `dtype`.

    `in_axes` and `out_axes` are logical axes. Without a `name` it has that of its attribute.
    """
    features = features if isinstance(features, tuple) else (features,)
    return Dense(
        features,
        axis=tuple(range(-len(in_axes), 0)),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, (*in_axes, *out_axes)),
        bias_init=nn.with_logical_partitioning(bias_init, bias_axes(out_axes)),
        dot_general=_product,
        lora=lora,
        name=name,
    )


def _product(x, kernel, dimensions, **options):
    """`jax.lax.dot_general` of the last axes of x and the first of a kernel; on one CPU of two matrices.

    For more axes XLA's CPU backend copies transposed gradients: a third of the time of an MLP. A TPU would
    copy to join the axes.
    """
    if not placement.on_one_cpu():
        return jax.lax.dot_general(x, kernel, dimensions, **options)
    shared = len(dimensions[0][1])
    rows = x.reshape(-1, math.prod(kernel.shape[:shared]))
    matrix = kernel.reshape(rows.shape[1], -1)
    product = jax.lax.dot_general(rows, matrix, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*x.shape[: x.ndim - shared], *kernel.shape[shared:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, on_gpu: bool) -> jax.Array:
    return _norm_forward(x, scale, bias, eps, on_gpu)[0]


def _norm_forward(x, scale, bias, eps, on_gpu):
    y = x.astype(jnp.float32)
    mean, variance = _moments(y) if on_gpu else (jnp.mean(y, -1), None)
    centred = y - mean[..., None]
    if variance is None:  # not E[x^2] - E[x]^2, which loses digits that parity with torch needs
        variance = jnp.mean(centred * centred, -1)
    rstd = jax.lax.rsqrt(variance + eps)
    y = centred * (rstd[..., None] * scale) + bias
    return y.astype(x.dtype), (x, scale, mean, rstd)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over the last axis in one pass, by the update of Chan et al. (1979)."""

    def joined(a, b):
        (n, mean, squares), (m, other, more) = a, b
        total, d = n + m, other - mean
        share = m / jnp.maximum(total, 1)
        return total, mean + d * share, squares + more + d * d * n * share

    zero = jnp.zeros((), x.dtype)
    of_one = jnp.ones_like(x), x, jnp.zeros_like(x)
    count, mean, squares = jax.lax.reduce(of_one, (zero,) * 3, joined, (x.ndim - 1,))
    return mean, squares / count


def _norm_backward(eps, on_gpu, residuals, dy):
    x, scale, mean, rstd = residuals
    given, dy = dy, dy.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean[..., None]) * rstd[..., None]
    d = dy * scale
    d = d - jnp.mean(d, -1, keepdims=True) - normed * jnp.mean(d * normed, -1, keepdims=True)
    dx = (d * rstd[..., None]).astype(x.dtype)
    if on_gpu:  # else XLA writes both factors in float32, for the sums over rows
        x, dy, mean, rstd = jax.lax.optimization_barrier((x, given, mean, rstd))
        dy = dy.astype(jnp.float32)
        normed = (x.astype(jnp.float32) - mean[..., None]) * rstd[..., None]
    rows = tuple(range(x.ndim - 1))
    return dx, jnp.sum(dy * normed, rows), jnp.sum(dy, rows)


_norm.defvjp(_norm_forward, _norm_backward)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, [..., E]; computed in float32, returned in the dtype of the input.

    The backward pass keeps the input and two numbers a row. JAX's own derivative keeps three float32 arrays
    of the input's shape, more than half of all that a bfloat16 block keeps.
    """

    eps: float

    def __call__(self, x: jax.Array) -> jax.Array:
        return _norm(x, *self.parameters(x.shape[-1]), self.eps, placement.on_gpu())

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
    draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape[1:])
    return jnp.where(jax.vmap(draw)(keys), x / (1 - rate), 0).astype(x.dtype)


class Affine(nn.Module):
    """`dense` as one matrix and one vector, for a product with the heads side by side or inside a kernel.

    Its parameters have the names, shapes, axes and initial values that `dense` gives them.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str, ...]  # logical axes
    out_axes: tuple[str, ...]
    dtype: np.dtype  # of the matrix, the vector and the product
    kernel_init: Init
    bias_init: Init = zeros
    use_bias: bool = True
    lora: float = 0.0  # as of `Dense`

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] -> [..., outputs]."""
        return _with_factors(self, x, self.product(x, *self.parameters()), flat=True)

    @nn.nowrap
    def product(self, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        """The same with a matrix and a vector from elsewhere."""
        return jnp.einsum("...e,ef->...f", x.astype(self.dtype), kernel) + bias

    @nn.compact
    def parameters(self) -> tuple[jax.Array, jax.Array]:
        """(matrix [inputs, outputs], vector [outputs]); the vector is zero without a bias."""
        matrix = math.prod(self.in_shape), math.prod(self.out_shape)

        def flat(init, flat_shape):  # nn.DenseGeneral draws a matrix, too
            return lambda key, shape, dtype=jnp.float32: init(key, flat_shape, dtype).reshape(shape)

        kernel_init, shape = flat(self.kernel_init, matrix), (*self.in_shape, *self.out_shape)
        axes = (*self.in_axes, *self.out_axes)
        kernel = parameter(self, "kernel", kernel_init, axes, shape)
        bias = jnp.zeros(matrix[1:])
        if self.use_bias:
            bias_init, axes = flat(self.bias_init, matrix[1:]), bias_axes(self.out_axes)
            bias = parameter(self, "bias", bias_init, axes, self.out_shape)
        return kernel.reshape(matrix).astype(self.dtype), bias.reshape(-1).astype(self.dtype)


class MLP(nn.Module):
    """Two dense layers with an activation between; `gated`: that of a third one times the first (SwiGLU)."""

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
    lora: float = 0.0  # as of `Dense`

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
                lora=self.lora,
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
                lora=module.lora,
                name="out",
            )(x)

        # [B, L, mlp_dim] is the widest array. The backward pass keeps it before the activation and
        # computes that again; JAX's derivative of the exact GELU keeps three more arrays of its size.
        return nn.remat(from_hidden, prevent_cse=False)(self, *hidden)


UNROLLED = 24  # layers without a loop, at most: the compile time grows with them
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


def unrolled(tower: ImageTower | TextTower | RegionDecoder, remat: str, program: str) -> int:
    """`unroll` of `scan_layers` for layers with this program of attention; cuDNN's stands for GPUs.

    A loop copies what a kernel keeps for the backward pass into its stack and out again: more traffic than
    the layers themselves cause (docs/performance.md). XLA's own programs write into the stack. With fsdp the
    loop stays: more gathers run beside work in it.
    """
    if tower.unroll:
        return tower.unroll
    mesh = placement.mesh()
    gathers = mesh is not None and mesh.shape.get("fsdp", 1) > 1  # each layer its weights
    copies = remat == "none" and program in ("pallas", "cudnn") and not gathers
    return tower.depth if copies and tower.depth <= UNROLLED else 1
