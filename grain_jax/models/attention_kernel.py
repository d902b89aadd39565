"""Self-attention as a Pallas TPU kernel, forward and backward: the scores of a head stay in VMEM.

Queries, keys and values are [B, L, heads * width], the heads side by side: none is padded to the 128 lanes of
a register. Or they are one array, the result of one product (`arranged`). A program has a few heads of a few
rows of the batch, a multiple of 128 lanes if the widths allow it. It works on transposed arrays: heads are
then rows, and softmax and LayerNorm reduce over rows, without shuffles of lanes. Scores are [keys, queries],
in base 2. LayerNorm of queries and keys is inside, with the queries' factors: a bias of the keys changes no
softmax. The backward pass keeps the inputs alone and computes norms and weights again, as FlashAttention (Dao
et al. 2022). Whole rows of scores fit into VMEM, so no softmax is pieced together. Several heads are at the
same stage, so that one computes while another waits (`python -m benchmarks.kernels` counts the cycles).

On other platforms the kernel runs in Pallas' interpreter, for tests.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from grain_jax.models import placement

TILE = 128  # lanes of a register
BLOCK_BYTES = 2**19  # of one array in VMEM; a backward program has eight, twice over
MOST_ROWS = 8  # of the batch, in one program
TOGETHER_FORWARD, TOGETHER_BACKWARD = 8, 4  # heads at the same stage, at most
LN2 = math.log(2)
VMEM_BYTES = 100 * 2**20  # at most; v5e has 128 MiB


@dataclasses.dataclass(frozen=True)
class _Heads:
    """The heads of one program: `count` of `width` lanes, side by side."""

    count: int
    width: int

    @property
    def lanes(self) -> int:
        return self.count * self.width

    def rows(self, head: int) -> slice:
        """The rows of a head in a transposed array."""
        return slice(head * self.width, (head + 1) * self.width)

    def split(self, x) -> list:
        """[lanes, L] -> the rows of each head. Sixteen rows of bfloat16 share a register: else by float32."""
        whole = self.width % 16 == 0
        parts = x if whole else x.astype(jnp.float32)
        return [parts[self.rows(head)].astype(x.dtype) for head in range(self.count)]

    def times(self, x, parts: list) -> list:
        """x [L, lanes] times each head [width, n] -> [L, n]; zeros stand for others on its tiles of lanes."""
        out = []
        for head, part in enumerate(parts):
            first, end = head * self.width, (head + 1) * self.width
            low, high = first // TILE * TILE, min(-(-end // TILE) * TILE, self.lanes)
            zeros = lambda rows, like=part: [jnp.zeros((rows, like.shape[1]), like.dtype)][: bool(rows)]
            filled = jnp.concatenate([*zeros(first - low), part, *zeros(high - end)], 0)
            out.append(_dot(x[:, low:high], filled.astype(x.dtype), ((1,), (0,))))
        return out


def _heads_of_a_program(heads: int, width: int) -> _Heads:
    """The fewest heads whose lanes fill whole tiles, or all."""
    count = math.lcm(width, TILE) // width
    return _Heads(count if heads % count == 0 else heads, width)


def _rows_of_a_program(batch: int, length: int, lanes: int, itemsize: int) -> int:
    fit = max(1, BLOCK_BYTES // (length * lanes * itemsize))
    return max(n for n in range(1, min(MOST_ROWS, fit) + 1) if batch % n == 0)


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _sum(x):
    return jnp.sum(x, 0, keepdims=True)


def _normed(x, eps):
    """LayerNorm of a head [width, L] without factors: (float32, 1 / deviation [1, L])."""
    centred = x - jnp.mean(x, 0, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(centred * centred, 0, keepdims=True) + eps)
    return centred * rstd, rstd


def _norm_backward(d, kept):
    """The gradient of the input of `_normed`, up to the factor of the exponential's base."""
    normed, rstd = kept
    mean = lambda x: jnp.mean(x, 0, keepdims=True)
    return (d - mean(d) - normed * mean(d * normed)) * (rstd * LN2)


class _Row(NamedTuple):
    """A row of the batch in a program, a list of heads [width, L] each."""

    queries: list  # times scale and factor of the norm, in the dtype of the keys
    keys: list
    natural_keys: jax.Array  # [L, lanes]
    kept: list | None  # of the norms: `_normed` of the queries and of the keys


def _read(heads, eps, q_ref, k_ref, norm_ref, row) -> _Row:
    dtype = k_ref.dtype
    q, k = (heads.split(ref[row].T.astype(jnp.float32)) for ref in (q_ref, k_ref))
    natural, kept = k_ref[row], None
    if eps is not None:
        kept = [[_normed(x, eps) for x in part] for part in (q, k)]
        q, k = ([normed for normed, _ in part] for part in kept)
        natural = jnp.concatenate(k, 0).astype(dtype).T
    scaled = []
    for head, x in enumerate(q):
        factor, bias = (norm_ref[heads.rows(head), i : i + 1] for i in (0, 1))
        scaled.append((x * factor + bias).astype(dtype))
    return _Row(scaled, [x.astype(dtype) for x in k], natural, kept)


def _weights(heads, row: _Row, allowed) -> list[tuple[jax.Array, jax.Array]]:
    """Of each head the weights [keys, queries] before division, and 1 / their sums [1, queries]; float32."""
    scores = heads.times(row.natural_keys, row.queries)
    if allowed is not None:
        scores = [jnp.where(allowed, x, jnp.finfo(jnp.float32).min) for x in scores]
    powers = [jnp.exp2(x - jnp.max(x, 0, keepdims=True)) for x in scores]
    return [(x, 1 / _sum(x)) for x in powers]


def _allowed(masks, row, causal):
    """bool [keys, queries]: within the same text, where `causal` itself and earlier ones; None: all."""
    if not masks:
        return None
    column, line = masks[0][row], masks[1][row]  # [L, 1], [1, L]
    if not causal:
        return column == line
    size = line.shape[1]
    numbers_along = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)
    return (column == line) & (numbers_along(0) <= numbers_along(1))


def _for_rows(ref, count, run) -> None:
    """Calls `run(rows)` for a few rows of a program at a time: with `count` heads at most, or one row."""
    total, most = ref.shape[0], max(1, count)
    group = max(n for n in range(1, most + 1) if total % n == 0)

    def some_rows(i, _):
        run([i * group + n for n in range(group)])
        return 0

    jax.lax.fori_loop(0, total // group, some_rows, 0)


def _write(ref, row, lanes: slice, parts: list) -> None:
    ref[row, :, lanes] = jnp.concatenate(parts, 0).astype(ref.dtype).T


def _forward_kernel(heads, eps, causal, q_ref, k_ref, v_ref, norm_ref, *rest):
    *masks, out_ref = rest
    dtype = v_ref.dtype

    def some_rows(rows):
        read = [_read(heads, eps, q_ref, k_ref, norm_ref, row) for row in rows]
        weights = [_weights(heads, x, _allowed(masks, row, causal)) for x, row in zip(read, rows)]
        for row, of_row in zip(rows, weights):
            v = heads.split(v_ref[row].T)
            out = [_dot(x, w.astype(dtype), ((1,), (0,))) * over for x, (w, over) in zip(v, of_row)]
            _write(out_ref, row, slice(None), out)

    _for_rows(q_ref, TOGETHER_FORWARD // heads.count, some_rows)


def _backward_kernel(heads, eps, causal, together, q_ref, k_ref, v_ref, norm_ref, do_ref, *rest):
    *rest, dnorm_ref = rest
    results = 1 if together else 3  # gradients of queries, keys and values
    masks, d_refs = rest[:-results], rest[-results:]
    dtype = v_ref.dtype

    @pl.when(pl.program_id(1) == 0)
    def _():
        dnorm_ref[...] = jnp.zeros(dnorm_ref.shape, jnp.float32)

    def of_scores(weights, d_weights, over):
        return (weights * (d_weights - over * _sum(weights * d_weights))).astype(dtype)

    def some_rows(rows):
        read = [_read(heads, eps, q_ref, k_ref, norm_ref, row) for row in rows]
        weights = [_weights(heads, x, _allowed(masks, row, causal)) for x, row in zip(read, rows)]
        do = [heads.split(do_ref[row].T.astype(jnp.float32)) for row in rows]
        # Divided by the sums here, where a head has fewer values than its weights.
        do = [[(d * over).astype(dtype) for d, (_, over) in zip(*x)] for x in zip(do, weights)]
        products = [heads.times(v_ref[row], d) for row, d in zip(rows, do)]
        d_scores = [[of_scores(w, d, over) for (w, over), d in zip(*x)] for x in zip(weights, products)]
        for row, x, d_out, of_row, d_row in zip(rows, read, do, weights, d_scores):
            dv = [_dot(d, w.astype(dtype), ((1,), (1,))) for d, (w, _) in zip(d_out, of_row)]
            dq = [_dot(k, d, ((1,), (0,))) for k, d in zip(x.keys, d_row)]
            dk = [_dot(q, d, ((1,), (1,))) for q, d in zip(x.queries, d_row)]
            for head in range(heads.count):
                at = heads.rows(head)
                factor = norm_ref[at, 0:1]
                if x.kept is None:
                    dq[head], dk[head] = dq[head] * (factor * LN2), dk[head] * LN2
                    continue
                of_q, of_k = x.kept[0][head], x.kept[1][head]
                for i, d in enumerate((dq[head] * of_q[0], dq[head])):
                    dnorm_ref[0, at, i : i + 1] += jnp.sum(d, 1, keepdims=True) * LN2
                dq[head] = _norm_backward(dq[head] * factor, of_q)
                dk[head] = _norm_backward(dk[head], of_k)
            for i, d in enumerate((dq, dk, dv)):
                start = i * heads.lanes if together else 0
                lanes = slice(start, start + heads.lanes)
                _write(d_refs[0 if together else i], row, lanes, d)

    _for_rows(q_ref, TOGETHER_BACKWARD // heads.count, some_rows)


@dataclasses.dataclass(frozen=True)
class _AttentionCall:
    """What a call is compiled for."""

    heads: int  # of one device
    eps: float | None  # of the norms; None: no norms
    interpret: bool  # run in Pallas' interpreter
    mesh: Mesh | None  # of the devices; None: one
    batch: tuple[str, ...]  # its axes that cut the leading axis
    cut_heads: str | None  # the axis that cuts the heads, or None
    causal: bool  # with ids: no position sees later ones
    together: bool  # queries, keys and values are one array (`arranged`)

    def _layout(self, qkv, masks):
        batch, length, lanes = qkv[0].shape
        heads = _heads_of_a_program(self.heads, lanes // (3 if self.together else 1) // self.heads)
        rows = _rows_of_a_program(batch, length, heads.lanes, qkv[0].dtype.itemsize)
        grid = (self.heads // heads.count, batch // rows)
        spec = lambda lanes, at: pl.BlockSpec((rows, length, lanes), at)
        block = spec(heads.lanes, lambda h, b: (b, 0, h))
        parts = gradients = [block] * 3
        if self.together:
            parts = [spec(heads.lanes, lambda h, b, i=i: (b, 0, 3 * h + i)) for i in range(3)]
            gradients = [spec(3 * heads.lanes, lambda h, b: (b, 0, h))]
        norm = pl.BlockSpec((heads.lanes, 8), lambda h, b: (0, 0))
        of_ids = [
            pl.BlockSpec((rows, length, 1), lambda h, b: (b, 0, 0)),
            pl.BlockSpec((rows, 1, length), lambda h, b: (b, 0, 0)),
        ]
        return heads, grid, block, parts, gradients, norm, of_ids if masks else []

    def _cost(self, like, products, arrays):
        """FLOPs and bytes as the compiler and `grain-jax plan` count them: products of all L x L scores."""
        batch, length, lanes = like.shape
        return pl.CostEstimate(
            flops=2 * products * batch * lanes * length * length,
            bytes_accessed=arrays * like.size * like.dtype.itemsize,
            transcendentals=batch * self.heads * length * length,
        )

    def _params(self):
        # Programs of the inner axis add to the same gradients of the norms.
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        )

    def _like(self, qkv):
        """Shape and dtype of the queries alone, and of the result."""
        *shape, lanes = qkv[0].shape
        lanes = lanes // 3 if self.together else lanes
        return jax.ShapeDtypeStruct((*shape, lanes), qkv[0].dtype)

    def forward(self, *arrays):
        """On one device: [B, L, lanes] each or one, norm [lanes of a program, 8], masks -> [B, L, lanes]."""
        qkv, norm, masks = self._split(arrays)
        heads, grid, block, parts, _, of_norm, of_masks = self._layout(qkv, masks)
        like = self._like(qkv)
        return pl.pallas_call(
            functools.partial(_forward_kernel, heads, self.eps, self.causal),
            grid=grid,
            in_specs=[*parts, of_norm, *of_masks],
            out_specs=block,
            out_shape=like,
            compiler_params=self._params(),
            cost_estimate=self._cost(like, products=2, arrays=4),
            interpret=self.interpret,
            name="attention_forward",
        )(*(qkv * 3 if self.together else qkv), norm, *masks)

    def backward(self, do, *arrays):
        """The result's gradient, then as `forward` -> those of what is given and of norms, [1, lanes, 8]."""
        qkv, norm, masks = self._split(arrays)
        heads, grid, block, parts, gradients, of_norm, of_masks = self._layout(qkv, masks)
        like = self._like(qkv)
        return pl.pallas_call(
            functools.partial(_backward_kernel, heads, self.eps, self.causal, self.together),
            grid=grid,
            in_specs=[*parts, of_norm, block, *of_masks],
            out_specs=[*gradients, pl.BlockSpec((1, heads.lanes, 8), lambda h, b: (0, h, 0))],
            out_shape=[
                *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv),
                jax.ShapeDtypeStruct((1, like.shape[-1], 8), jnp.float32),
            ],
            compiler_params=self._params(),
            cost_estimate=self._cost(like, products=5, arrays=7),
            interpret=self.interpret,
            name="attention_backward",
        )(*(qkv * 3 if self.together else qkv), norm, do, *masks)

    def _split(self, arrays):
        count = 1 if self.together else 3
        return arrays[:count], arrays[count], arrays[count + 1 :]

    def specs(self, qkv, masks):
        """How arrays with the heads last are cut, and what `forward` takes."""
        both = PartitionSpec(self.batch, None, self.cut_heads)
        of_masks = [PartitionSpec(self.batch)] * len(masks)
        return both, (*[both] * len(qkv), PartitionSpec(), *of_masks)


def _local_heads(heads: int) -> tuple[int, str | None]:
    """The heads of one device on the mesh of `placement`, and the axis that cuts them, or None."""
    mesh = placement.mesh()
    if mesh is not None and "tensor" in mesh.shape and heads % mesh.shape["tensor"] == 0:
        return heads // mesh.shape["tensor"], "tensor"
    return heads, None


def arranges(heads: int, width: int) -> bool:
    """Whether queries, keys and values can be `arranged`: the heads of a program fill whole tiles."""
    return _heads_of_a_program(_local_heads(heads)[0], width).lanes % TILE == 0


def arranged(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """[..., heads * width] each -> [..., 3 * heads * width] for `attend`, by program.

    Matrices and biases that make queries, keys and values are arranged so that one product makes all.
    """
    lanes = _heads_of_a_program(_local_heads(heads)[0], q.shape[-1] // heads).lanes
    parts = [x.reshape(*x.shape[:-1], -1, lanes) for x in (q, k, v)]
    return jnp.stack(parts, -2).reshape(*q.shape[:-1], -1)


def apart(qkv: jax.Array, heads: int) -> tuple[jax.Array, ...]:
    """What is `arranged`, as queries, keys and values."""
    lanes = _heads_of_a_program(_local_heads(heads)[0], qkv.shape[-1] // 3 // heads).lanes
    parts = qkv.reshape(*qkv.shape[:-1], -1, 3, lanes)
    return tuple(parts[..., i, :].reshape(*qkv.shape[:-1], -1) for i in range(3))


def attend(
    *given: jax.Array,
    heads: int,
    norms: tuple[jax.Array, ...] | None = None,
    eps: float | None = None,
    ids: jax.Array | None = None,
    causal: bool = True,
) -> jax.Array:
    """Softmax(q k^T / sqrt(width)) v of each head, on the mesh of `placement`.

    Args:
      given: queries, keys and values [B, L, heads * width]; or one array of all (`arranged`).
      heads: their number.
      norms: scale and bias of the queries' norm, then of the keys', float32 [width] each; or None.
      eps: of the norms.
      ids: int32 [B, L]: a position sees the positions with its id; None: its whole row.
      causal: with ids: of these itself and earlier ones.

    Returns:
      [B, L, heads * width], of the dtype of the values.
    """
    mesh, together = placement.mesh(), len(given) == 1
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    local, cut_heads = _local_heads(heads)
    eps = None if norms is None else eps
    call = _AttentionCall(
        local, eps, platform != "tpu", mesh, placement.batch_axes(), cut_heads, causal, together
    )
    width = given[0].shape[-1] // (3 if together else 1) // heads
    count_of_program = _heads_of_a_program(local, width).count
    ones = jnp.ones(width, jnp.float32)
    scale, bias, of_keys, _ = norms if norms is not None else (ones, jnp.zeros_like(ones), ones, None)
    factors = jnp.stack([scale, bias], 1) * of_keys[:, None] * (width**-0.5 / LN2)
    rows = jnp.pad(jnp.tile(factors, (count_of_program, 1)), ((0, 0), (0, 6)))
    masks = () if ids is None else (ids[:, :, None], ids[:, None, :])
    return _attend(call, given, rows, masks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _AttentionCall, qkv, norm, masks):
    return _attend_forward(call, qkv, norm, masks)[0]


def _attend_forward(call, qkv, norm, masks):
    both, specs = call.specs(qkv, masks)
    forward = placement.on_each_device(call.forward, call.mesh, specs, both)
    return forward(*qkv, norm, *masks), (qkv, norm, masks)


def _attend_backward(call, kept, do):
    qkv, norm, masks = kept
    both, specs = call.specs(qkv, masks)
    results = (*[both] * len(qkv), PartitionSpec(call.batch, call.cut_heads))
    backward = placement.on_each_device(call.backward, call.mesh, (both, *specs), results)
    *d_given, dnorm = backward(do, *qkv, norm, *masks)
    # [devices of the batch axes, lanes, 8] -> of the program that all heads share.
    dnorm = dnorm.sum(0).reshape(-1, *norm.shape).sum(0)
    return tuple(d_given), dnorm, tuple(None for _ in masks)


_attend.defvjp(_attend_forward, _attend_backward)
