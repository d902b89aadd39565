"""The attention programs on this device against products and softmax in float32: worst errors.

    python -m benchmarks.attention [--programs xla pallas] [--json OUT.json]

Image rows of 197 tokens with their norms, packed text rows of 77. On a CPU the shapes are small, and the kernel runs in
an interpreter.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from grain_jax.models import attention, layers

PROGRAMS = {"cpu": ["xla", "pallas"], "gpu": ["xla", "cudnn"], "tpu": ["xla", "pallas"]}
EPS = 1e-6  # of the norms of queries and keys


def rows(programs: Sequence[str], small: bool) -> Iterator[dict[str, Any]]:
    """Each attention program against products and softmax in float32: the worst error of values and of gradients."""
    images, heads = (2, 2) if small else (32, 12)
    shapes = {
        f"image {images} x 197, norms": (images, 197, heads, 64, True),
        f"text {images} x 77, causal in segments": (images, 77, 2 if small else 8, 64, False),
    }
    for name, shape in shapes.items():
        arrays, ids, weight = inputs(*shape)
        for dtype in ("float32", "bfloat16"):
            cast = (*(x.astype(dtype) for x in arrays[:3]), *arrays[3:])
            wide = jax.tree.map(lambda x: x.astype(jnp.float32), cast)
            with jax.default_matmul_precision("highest"):
                expected = with_gradients(program_of("xla", shape[2], ids), wide, weight)
            for program in programs:
                if program == "cudnn" and dtype == "float32":  # cuDNN has none
                    continue
                got = with_gradients(program_of(program, shape[2], ids), cast, weight)
                value, gradient = (worst(g, e) for g, e in zip(got, expected))
                yield dict(shape=name, program=program, dtype=dtype, value=value, gradient=gradient)


def inputs(batch: int, length: int, heads: int, width: int, normed: bool):
    """((q, k, v, norms or ()), segment ids or None, weights of the sum whose gradients are compared), float32."""
    rng = np.random.default_rng(0)
    q, k, v, weight = (
        jnp.asarray(x, jnp.float32) for x in rng.normal(size=(4, batch, length, heads * width))
    )
    scale, bias = [[1], [0], [1], [0]], [[0.1]] * 4
    norms = rng.normal(size=(4, width)) * bias + scale
    ids = None if normed else jnp.asarray(np.sort(rng.integers(0, 5, (batch, length))), jnp.int32)
    return (q, k, v, *(map(jnp.float32, norms) if normed else ())), ids, weight


def program_of(program: str, heads: int, ids) -> Callable:
    """(q, k, v, *norms) -> attention [B, L, lanes] as the layers of the model compute it."""
    within = None if ids is None else attention.CausalWithin(ids)

    def run(q, k, v, *norms):
        if program == "pallas":
            eps = EPS if norms else None
            options = dict(heads=heads, norms=norms or None, eps=eps, within=within)
            return attention.with_pallas(q, k, v, **options)
        q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
        if norms:
            q, k = layers._norm(q, *norms[:2], EPS), layers._norm(k, *norms[2:], EPS)
        if program == "cudnn":
            out = attention.with_cudnn(q, k, v, within)
        else:
            scaled = q * q.shape[-1] ** -0.5
            scores = jnp.einsum("bqkh,bskh->bkqs", scaled, k, preferred_element_type=jnp.float32)
            if within is not None:
                scores = jnp.where(within.mask(), scores, jnp.finfo(jnp.float32).min)
            out = jnp.einsum("bkqs,bskh->bqkh", layers.softmax(scores, v.dtype), v)
        return out.reshape(*out.shape[:2], -1)

    return run


def with_gradients(function: Callable, arrays: tuple, weight) -> tuple[Any, Any]:
    """(value, gradients of its sum with `weight`) of a function of `arrays`, which are q, k, v and the norms."""

    def run(arrays):
        value, pull_back = jax.vjp(lambda x: function(*x), arrays)
        grads = pull_back(weight.astype(value.dtype))[0]
        return value, grads[:6]  # not that of the bias of the keys, which is 0 but for rounding

    return jax.jit(run)(arrays)


def worst(got: Any, expected: Any) -> float:
    """The largest difference, in parts of the largest value of its array."""
    got, expected = (
        [np.asarray(x, np.float64) for x in jax.tree.leaves(t)] for t in (got, expected)
    )
    return max(float(np.abs(a - e).max() / np.abs(e).max()) for a, e in zip(got, expected))


def main() -> None:
    """Prints the errors of the programs that the device runs."""
    chip = jax.devices()[0]
    args = harness.arguments(__doc__, programs=(PROGRAMS[chip.platform], {}))
    table = harness.Table(dict(shape="36", program="8", dtype="9", value=">9.1e", gradient=">9.1e"))
    for row in rows(args.programs, small=chip.platform == "cpu"):
        table.add(**row)
    harness.write(args.json, dict(device=chip.device_kind, rows=table.rows))


if __name__ == "__main__":
    main()
