"""The second half of a tower's layer as a Pallas TPU kernel, forward and backward: x + MLP(LayerNorm(x)).

XLA writes the hidden values [B, L, mlp_dim], the widest arrays of a layer, to main memory once and moves them six times
more: activation, product and their derivatives are separate programs. Here a program has a few rows of the batch and all
weights in VMEM. The forward pass writes the hidden values before the activation once, the backward pass reads them once.
Gradients of the weights stay in VMEM, in float32, until all rows have added to them. Norm and residual are inside, so
an input is read once and a result written once. No product is computed twice.

On other platforms the kernel runs in Pallas' interpreter, for tests.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from grain_jax.models import placement
from grain_jax.models.attention_kernel import VMEM_BYTES

CHUNK = 1024  # hidden values that are worked on at a time, at most
BLOCK_BYTES = 2**20  # of the input of one program
MOST_ROWS = 8  # of the batch, in one program

# Bytes of VMEM that a program may take, by `jax.Device.device_kind`, of chips whose devices have one core: the gradients
# are summed by one. 5/6 of what there is, and at most VMEM_BYTES.
VMEM = {"TPU v5 lite": VMEM_BYTES, "TPU v6 lite": VMEM_BYTES, "TPU7x": 53 * 2**20}

Activation = Callable[[jax.Array], jax.Array]


def fits(width: int, mlp_dim: int, length: int, device_kind: str) -> bool:
    """Whether the backward program fits into the memory of a core, in bfloat16, by an estimate.

    Args:
      width, mlp_dim: E and H, of the layer.
      length: L, positions of a row.
      device_kind: as `jax.Device.device_kind`.

    Weights, gradients and the float32 sums of these take 8 bytes a weight. The factors of what a row takes are chosen so that
    the estimate agrees with compiles for v5e: B/16 fits with 1400 positions and not with 2048, L/14 with 600.
    """
    of_row = length * (24 * width + 4 * mlp_dim + 16 * CHUNK)
    return 16 * width * mlp_dim + of_row <= VMEM.get(device_kind, 0)


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _chunks(mlp_dim: int) -> list[slice]:
    """The hidden values in equal parts of whole registers of 128 lanes; or in one part, if that is impossible."""
    parts = (n for n in range(1, mlp_dim + 1) if mlp_dim % n == 0)
    size = next(
        (mlp_dim // n for n in parts if mlp_dim // n <= CHUNK and mlp_dim // n % 128 == 0), mlp_dim
    )
    return [slice(i, i + size) for i in range(0, mlp_dim, size)]


def _normed(x, vectors, eps):
    """LayerNorm of [L, E]: (in the dtype of x, normed float32, 1 / deviation float32)."""
    y = x.astype(jnp.float32)
    centred = y - jnp.mean(y, -1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    normed = centred * rstd
    return (normed * vectors[0:1] + vectors[1:2]).astype(x.dtype), normed, rstd


def _forward_kernel(eps, activation, x_ref, vectors_ref, bias_ref, in_ref, out_ref, y_ref, h_ref):
    def one_row(row, _):
        x = x_ref[row]
        normed, _, _ = _normed(x, vectors_ref, eps)
        y = jnp.zeros(x.shape, jnp.float32)
        for part in _chunks(h_ref.shape[-1]):
            hidden = _dot(normed, in_ref[:, part], ((1,), (0,))) + bias_ref[0:1, part]
            hidden = hidden.astype(x.dtype)
            h_ref[row, :, part] = hidden
            activated = activation(hidden.astype(jnp.float32)).astype(x.dtype)
            y += _dot(activated, out_ref[part, :], ((1,), (0,)))
        y_ref[row] = x + (y + vectors_ref[2:3]).astype(x.dtype)
        return 0

    jax.lax.fori_loop(0, x_ref.shape[0], one_row, 0)


def _backward_kernel(eps, activation, *refs):
    x_ref, vectors_ref, in_ref, out_ref, h_ref, dy_ref, *results, sum_in, sum_out = refs
    dx_ref, dvectors_ref, dbias_ref, din_ref, dout_ref = results
    step, last = pl.program_id(0), pl.num_programs(0) - 1

    @pl.when(step == 0)
    def _():
        for ref in (dvectors_ref, dbias_ref, sum_in, sum_out):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def one_row(row, _):
        x, dy = x_ref[row], dy_ref[row]
        normed, plain, rstd = _normed(x, vectors_ref, eps)
        d = jnp.zeros(x.shape, jnp.float32)  # of the normed input
        for part in _chunks(h_ref.shape[-1]):
            hidden = h_ref[row, :, part].astype(jnp.float32)
            activated, pull = jax.vjp(activation, hidden)
            d_hidden = pull(_dot(dy, out_ref[part, :], ((1,), (1,))))[0]
            dbias_ref[0, 0:1, part] += jnp.sum(d_hidden, 0, keepdims=True)
            d_hidden = d_hidden.astype(x.dtype)
            d += _dot(d_hidden, in_ref[:, part], ((1,), (1,)))
            sum_in[:, part] += _dot(normed, d_hidden, ((0,), (0,)))
            sum_out[part, :] += _dot(activated.astype(x.dtype), dy, ((0,), (0,)))
        dy = dy.astype(jnp.float32)
        for i, rows in enumerate((d * plain, d, dy)):
            dvectors_ref[0, i : i + 1] += jnp.sum(rows, 0, keepdims=True)
        d = d * vectors_ref[0:1]
        mean = lambda y: jnp.mean(y, -1, keepdims=True)
        d = (d - mean(d) - plain * mean(d * plain)) * rstd
        dx_ref[row] = (dy + d).astype(x.dtype)
        return 0

    jax.lax.fori_loop(0, x_ref.shape[0], one_row, 0)

    @pl.when(step == last)
    def _():
        din_ref[0] = sum_in[...].astype(din_ref.dtype)
        dout_ref[0] = sum_out[...].astype(dout_ref.dtype)


@dataclasses.dataclass(frozen=True)
class _MLPCall:
    """What a call is compiled for."""

    eps: float
    activation: Activation  # float32 to float32
    interpret: bool  # run in Pallas' interpreter
    mesh: Mesh | None  # of the devices; None: one
    batch: tuple[str, ...]  # its axes that cut the leading axis

    def _layout(self, x):
        batch, length, width = x.shape
        fit = max(1, BLOCK_BYTES // (length * width * x.dtype.itemsize))
        rows = max(n for n in range(1, min(MOST_ROWS, fit) + 1) if batch % n == 0)
        block = lambda lanes: pl.BlockSpec((rows, length, lanes), lambda b: (b, 0, 0))
        # Fetched once for all rows: a second buffer would be waste.
        whole = lambda *shape: pl.BlockSpec(
            shape, lambda b: (0,) * len(shape), pipeline_mode=pl.Buffered(1)
        )
        return (batch // rows,), block, whole

    def _options(self, x, mlp_dim, products, inner) -> dict[str, Any]:
        batch, length, width = x.shape
        weights = 2 * width * mlp_dim * x.dtype.itemsize
        traffic = batch * length * (inner * width + mlp_dim) * x.dtype.itemsize
        return dict(
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * batch * length * width * mlp_dim,
                bytes_accessed=traffic + weights * products // 2,
                transcendentals=batch * length * mlp_dim,
            ),
            interpret=self.interpret,
        )

    def forward(self, x, vectors, bias, w_in, w_out):
        """On one device: x [B, L, E], float32 vectors [8, E] and bias [8, H], weights -> (result, hidden values)."""
        width, mlp_dim = w_in.shape
        grid, block, whole = self._layout(x)
        return pl.pallas_call(
            functools.partial(_forward_kernel, self.eps, self.activation),
            grid=grid,
            in_specs=[
                block(width),
                whole(8, width),
                whole(8, mlp_dim),
                whole(width, mlp_dim),
                whole(mlp_dim, width),
            ],
            out_specs=[block(width), block(mlp_dim)],
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype),
                jax.ShapeDtypeStruct((*x.shape[:2], mlp_dim), x.dtype),
            ],
            name="mlp_forward",
            **self._options(x, mlp_dim, products=2, inner=2),
        )(x, vectors, bias, w_in, w_out)

    def backward(self, x, vectors, w_in, w_out, hidden, dy):
        """Gradients of x, vectors, bias and weights; all but the first with a leading axis for the devices."""
        width, mlp_dim = w_in.shape
        grid, block, whole = self._layout(x)
        shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype)
        return pl.pallas_call(
            functools.partial(_backward_kernel, self.eps, self.activation),
            grid=grid,
            in_specs=[
                block(width),
                whole(8, width),
                whole(width, mlp_dim),
                whole(mlp_dim, width),
                block(mlp_dim),
                block(width),
            ],
            out_specs=[
                block(width),
                whole(1, 8, width),
                whole(1, 8, mlp_dim),
                whole(1, width, mlp_dim),
                whole(1, mlp_dim, width),
            ],
            out_shape=[
                shape(x.dtype, *x.shape),
                shape(jnp.float32, 1, 8, width),
                shape(jnp.float32, 1, 8, mlp_dim),
                shape(w_in.dtype, 1, width, mlp_dim),
                shape(w_out.dtype, 1, mlp_dim, width),
            ],
            scratch_shapes=[
                pltpu.VMEM((width, mlp_dim), jnp.float32),
                pltpu.VMEM((mlp_dim, width), jnp.float32),
            ],
            name="mlp_backward",
            **self._options(x, mlp_dim, products=4, inner=3),
        )(x, vectors, w_in, w_out, hidden, dy)


def half_layer(
    x: jax.Array,
    *,
    scale: jax.Array,
    bias: jax.Array,
    eps: float,
    w_in: jax.Array,
    b_in: jax.Array,
    w_out: jax.Array,
    b_out: jax.Array,
    activation: Activation,
) -> jax.Array:
    """x + activation(LayerNorm(x) w_in + b_in) w_out + b_out, on the mesh of `placement`.

    Args:
      x: [B, L, E].
      scale, bias: of the norm, float32 [E].
      eps: of the norm.
      w_in, b_in: [E, H] and [H]; computed in the dtype of x.
      w_out, b_out: [H, E] and [E].
      activation: of float32 values.

    Returns:
      [B, L, E], of the dtype of x.
    """
    mesh = placement.mesh()
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    call = _MLPCall(eps, activation, platform != "tpu", mesh, placement.batch_axes())
    # Eight rows: float32 comes in registers of 8 x 128.
    vectors = jnp.stack([scale, bias, b_out.astype(jnp.float32), *[jnp.zeros_like(scale)] * 5])
    of_hidden = jnp.pad(b_in.astype(jnp.float32)[None], ((0, 7), (0, 0)))
    return _half_layer(call, x, vectors, of_hidden, w_in.astype(x.dtype), w_out.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _half_layer(call: _MLPCall, x, vectors, bias, w_in, w_out):
    return _half_layer_forward(call, x, vectors, bias, w_in, w_out)[0]


def _half_layer_forward(call, x, vectors, bias, w_in, w_out):
    batch, whole = PartitionSpec(call.batch), PartitionSpec()
    specs = batch, *[whole] * 4
    forward = placement.on_each_device(call.forward, call.mesh, specs, (batch, batch))
    y, hidden = forward(x, vectors, bias, w_in, w_out)
    return y, (x, vectors, w_in, w_out, hidden)


def _half_layer_backward(call, kept, dy):
    batch, whole = PartitionSpec(call.batch), PartitionSpec()
    specs = batch, whole, whole, whole, batch, batch
    backward = placement.on_each_device(call.backward, call.mesh, specs, (batch,) * 5)
    dx, *of_weights = backward(*kept, dy)
    return dx, *(d.sum(0) for d in of_weights)


_half_layer.defvjp(_half_layer_forward, _half_layer_backward)
