"""Self-attention as a Pallas TPU kernel, forward and backward: the scores of a head stay in VMEM.

Queries, keys and values are [B, L, heads * width], with the heads side by side: no head is padded to the 128 lanes of a
register. Or they are one array, the result of one product (`arranged`). A program has a few heads of a few rows of the
batch, a multiple of 128 lanes if the widths allow it. It works on tiles of 128 lanes. A head that shares a tile reads it
through a mask. This costs no extra pass of the matrix unit, which has 128 lanes as well. LayerNorm of queries and keys
is inside. The backward pass keeps the inputs alone and computes norms and weights again
(as FlashAttention does, Dao et al. 2022; whole rows of scores fit into VMEM here, so no softmax is pieced together).

On other platforms the kernel runs in Pallas' interpreter, for tests.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from grain_jax.models import placement

TILE = 128  # lanes of a register
BLOCK_BYTES = 2**19  # of one array in VMEM; a backward program has eight, twice over
MOST_ROWS = 8  # of the batch, in one program
VMEM_BYTES = 100 * 2**20  # at most; v5e has 128 MiB


@dataclasses.dataclass(frozen=True)
class _Heads:
    """The heads of one program: `count` of `width` lanes, side by side."""

    count: int
    width: int

    @property
    def lanes(self) -> int:
        return self.count * self.width

    @property
    def tiles(self) -> list[slice]:
        """The lanes of each tile."""
        return [slice(i, min(i + TILE, self.lanes)) for i in range(0, self.lanes, TILE)]

    def parts(self, head: int) -> list[tuple[int, jax.Array | None]]:
        """The tiles that have lanes of the head: (tile, its lanes of the head as a mask [1, lanes]; None: all)."""
        first, end = head * self.width, (head + 1) * self.width
        out = []
        for number, tile in enumerate(self.tiles):
            low, high = max(first, tile.start), min(end, tile.stop)
            if low < high:
                size = tile.stop - tile.start
                lane = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) + tile.start
                whole = high - low == size
                out.append((number, None if whole else (lane >= low) & (lane < high)))
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


def _only(mask, x):
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def _head_means(heads: _Heads, tiles: list) -> list:
    """float32 [L, lanes] each -> the mean over the lanes of each head, at all of its lanes."""
    out = [jnp.zeros_like(x) for x in tiles]
    for head in range(heads.count):
        parts = heads.parts(head)
        sums = [jnp.sum(_only(mask, tiles[i]), -1, keepdims=True) for i, mask in parts]
        mean = sum(sums[1:], sums[0]) / heads.width
        for i, mask in parts:
            out[i] = (
                jnp.broadcast_to(mean, out[i].shape)
                if mask is None
                else jnp.where(mask, mean, out[i])
            )
    return out


def _normed(heads: _Heads, tiles: list, scale: list, bias: list, eps: float):
    """LayerNorm of each head: (in the dtype of the tiles, normed float32, 1 / deviation float32)."""
    x = [tile.astype(jnp.float32) for tile in tiles]
    centred = [a - b for a, b in zip(x, _head_means(heads, x))]
    squares = _head_means(heads, [c * c for c in centred])
    rstd = [jax.lax.rsqrt(s + eps) for s in squares]
    normed = [c * r for c, r in zip(centred, rstd)]
    out = [(n * s + b).astype(t.dtype) for n, s, b, t in zip(normed, scale, bias, tiles)]
    return out, normed, rstd


def _queries_and_keys(heads, eps, q_ref, k_ref, norm_ref, row):
    """Tiles of the normed queries and keys, and what their backward pass needs."""
    q, k = ([ref[row, :, tile] for tile in heads.tiles] for ref in (q_ref, k_ref))
    if eps is None:
        return q, k, None, None
    rows_of_norm = lambda i: [norm_ref[i : i + 1, tile] for tile in heads.tiles]
    q, *q_kept = _normed(heads, q, rows_of_norm(0), rows_of_norm(1), eps)
    k, *k_kept = _normed(heads, k, rows_of_norm(2), rows_of_norm(3), eps)
    return q, k, q_kept, k_kept


def _weights(heads, head, q, k, allowed):
    """Softmax of the scores of a head, float32 [n, n]."""
    parts = heads.parts(head)
    scaled = [_only(mask, q[i] * heads.width**-0.5) for i, mask in parts]
    scores = [_dot(a.astype(k[0].dtype), k[i], ((1,), (1,))) for a, (i, _) in zip(scaled, parts)]
    scores = sum(scores[1:], scores[0])
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    exp = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    return exp / jnp.sum(exp, -1, keepdims=True)


def _allowed(masks, row, causal):
    """bool [L, L]: within the same text, where `causal` itself and earlier ones; None: all."""
    if not masks:
        return None
    column, line = masks[0][row], masks[1][row]  # [L, 1], [1, L]
    if not causal:
        return column == line
    size = line.shape[1]
    numbers_along = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)
    return (column == line) & (numbers_along(0) >= numbers_along(1))


def _for_each_row(ref, run) -> None:
    """Calls `run(row)` for each row of a program."""

    def one_row(row, _):
        run(row)
        return 0

    jax.lax.fori_loop(0, ref.shape[0], one_row, 0)


def _write(ref, row, tiles: list[slice], values: list) -> None:
    for tile, x in zip(tiles, values):
        ref[row, :, tile] = x.astype(ref.dtype)


def _forward_kernel(heads, eps, causal, q_ref, k_ref, v_ref, norm_ref, *rest):
    *masks, out_ref = rest

    def one_row(row):
        q, k, _, _ = _queries_and_keys(heads, eps, q_ref, k_ref, norm_ref, row)
        v = [v_ref[row, :, tile] for tile in heads.tiles]
        allowed = _allowed(masks, row, causal)
        out = [jnp.zeros(x.shape, jnp.float32) for x in v]
        for head in range(heads.count):
            weights = _weights(heads, head, q, k, allowed).astype(v[0].dtype)
            for i, mask in heads.parts(head):
                out[i] += _dot(weights, _only(mask, v[i]), ((1,), (0,)))
        _write(out_ref, row, heads.tiles, out)

    _for_each_row(q_ref, one_row)


def _norm_backward(heads, d, kept, scale):
    """(gradients of the input of LayerNorm, of its scale, of its bias), tiles each."""
    normed, rstd = kept
    d_scale = [jnp.sum(a * n, 0, keepdims=True) for a, n in zip(d, normed)]
    d_bias = [jnp.sum(a, 0, keepdims=True) for a in d]
    d = [a * s for a, s in zip(d, scale)]
    means = _head_means(heads, d)
    products = _head_means(heads, [a * n for a, n in zip(d, normed)])
    d = [(a - m - n * p) * r for a, m, n, p, r in zip(d, means, normed, products, rstd)]
    return d, d_scale, d_bias


def _backward_kernel(heads, eps, causal, together, q_ref, k_ref, v_ref, norm_ref, do_ref, *rest):
    *rest, dnorm_ref = rest
    results = 1 if together else 3  # gradients of queries, keys and values
    masks, d_refs = rest[:-results], rest[-results:]
    dtype = v_ref.dtype
    tiles = heads.tiles

    @pl.when(pl.program_id(1) == 0)
    def _():
        dnorm_ref[...] = jnp.zeros(dnorm_ref.shape, jnp.float32)

    def one_row(row):
        q, k, q_kept, k_kept = _queries_and_keys(heads, eps, q_ref, k_ref, norm_ref, row)
        v, do = ([ref[row, :, tile] for tile in tiles] for ref in (v_ref, do_ref))
        allowed = _allowed(masks, row, causal)
        dq, dk, dv = ([jnp.zeros(x.shape, jnp.float32) for x in v] for _ in range(3))
        for head in range(heads.count):
            parts = heads.parts(head)
            weights = _weights(heads, head, q, k, allowed).astype(dtype)
            products = [_dot(_only(mask, do[i]), v[i], ((1,), (1,))) for i, mask in parts]
            d_weights = sum(products[1:], products[0])
            weights_32 = weights.astype(jnp.float32)
            d_scores = weights_32 * d_weights
            row_sums = jnp.sum(d_scores, -1, keepdims=True)
            d_scores = (d_scores - weights_32 * row_sums).astype(dtype)
            for i, mask in parts:
                dv[i] += _dot(weights, _only(mask, do[i]), ((0,), (0,)))
                dq[i] += _dot(d_scores, _only(mask, k[i]), ((1,), (0,)))
                dk[i] += _dot(d_scores, _only(mask, q[i]), ((0,), (0,)))
        dq, dk = ([x * heads.width**-0.5 for x in d] for d in (dq, dk))
        if eps is not None:
            rows_of_norm = lambda i: [norm_ref[i : i + 1, tile] for tile in tiles]
            dq, *d_query_norm = _norm_backward(heads, dq, q_kept, rows_of_norm(0))
            dk, *d_key_norm = _norm_backward(heads, dk, k_kept, rows_of_norm(2))
            for i, parts in enumerate([*d_query_norm, *d_key_norm]):
                for tile, part in zip(tiles, parts):
                    dnorm_ref[0, i : i + 1, tile] += part
        for i, d in enumerate((dq, dk, dv)):
            start = i * heads.lanes if together else 0
            lanes = [slice(start + tile.start, start + tile.stop) for tile in tiles]
            _write(d_refs[0 if together else i], row, lanes, d)

    _for_each_row(q_ref, one_row)


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
        norm = pl.BlockSpec((8, heads.lanes), lambda h, b: (0, 0))
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
        """Attention on one device: [B, L, lanes] each or one, norm float32 [8, lanes of a program], masks -> [B, L, lanes]."""
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
        """The gradient of the result, then as of `forward` -> gradients of what is given, and of the norms, [1, 8, lanes]."""
        qkv, norm, masks = self._split(arrays)
        heads, grid, block, parts, gradients, of_norm, of_masks = self._layout(qkv, masks)
        like = self._like(qkv)
        return pl.pallas_call(
            functools.partial(_backward_kernel, heads, self.eps, self.causal, self.together),
            grid=grid,
            in_specs=[*parts, of_norm, block, *of_masks],
            out_specs=[*gradients, pl.BlockSpec((1, 8, heads.lanes), lambda h, b: (0, 0, h))],
            out_shape=[
                *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv),
                jax.ShapeDtypeStruct((1, 8, like.shape[-1]), jnp.float32),
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
    """[..., heads * width] each -> [..., 3 * heads * width] as `attend` takes it: of each program queries, keys, values.

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
      given: queries, keys and values [B, L, heads * width], heads side by side; or one array of all (`arranged`).
      heads: their number.
      norms: scale and bias of the queries' LayerNorm, then of the keys', float32 [width] each; None: no norms.
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
    if norms is None:
        rows = jnp.zeros((8, count_of_program * width), jnp.float32)
    else:  # eight rows: float32 comes in registers of 8 x 128
        rows = jnp.pad(jnp.tile(jnp.stack(norms), (1, count_of_program)), ((0, 4), (0, 0)))
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
    results = (both,) * (len(qkv) + 1)
    backward = placement.on_each_device(call.backward, call.mesh, (both, *specs), results)
    *d_given, dnorm = backward(do, *qkv, norm, *masks)
    # [devices of the batch axes, 8, lanes] -> of the program that all heads share.
    dnorm = dnorm.sum(0).reshape(8, -1, norm.shape[1]).sum(1)
    return tuple(d_given), dnorm, tuple(None for _ in masks)


_attend.defvjp(_attend_forward, _attend_backward)
