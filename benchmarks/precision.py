"""What the passes of a TPU's float32 products do to the losses: errors against float64.

    python -m benchmarks.precision [--json OUT.json]

A TPU multiplies float32 as sums of bfloat16 products: six of them for `loss.precision=highest`, three for "high", one
where neither is asked for. A CPU multiplies float32, so that the passes are spelt out here: float32 products of the
bfloat16 parts of both sides. The embeddings are near each other and the scale is large, the worst case of a softmax.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from grain_jax.losses import streaming
from grain_jax.losses.ring import Ring
from grain_jax.losses.streaming import Columns

ROWS, WIDTH, SCALE = 256, 512, 100.0


def _parts(x, count: int):
    """Bfloat16 parts of float32 values, as float32, the largest first; their sum is the value."""
    found = []
    for _ in range(count):
        found.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - found[-1]
    return found


def product(equation, a, b, passes: int):
    """The product as a TPU makes it in so many passes: pairs of parts whose orders sum to less than 1, 2 or 3."""
    order = {1: 1, 3: 2, 6: 3}[passes]
    pairs = [
        jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
        for i, x in enumerate(_parts(a, order))
        for j, y in enumerate(_parts(b, order))
        if i + j < order
    ]
    return sum(pairs[::-1])  # small ones first


@contextlib.contextmanager
def in_passes(passes: int) -> Iterator[None]:
    """The products of the streamed losses in so many passes; 0: float32."""
    plain = streaming._product
    if passes:
        streaming._product = lambda equation, a, b, _: product(equation, a, b, passes)
    try:
        yield
    finally:
        streaming._product = plain


def _loss(rows, columns):
    """The mean streamed loss of rows against columns, each with the column of its number as its own."""
    ids = jnp.arange(len(rows))
    given = (Columns(columns, ids, ids >= 0), jnp.float32(SCALE), jnp.float32(0))
    cost = streaming.negatives("softmax", 100, Ring(), rows, ids, *given).cost
    return streaming.loss_of_rows("softmax", SCALE * (rows * columns).sum(-1), cost).mean()


def main() -> None:
    """Prints the worst error of the loss, and of its gradient relative to the largest value."""
    machine = harness.machine("jax")
    args = harness.arguments(__doc__)
    columns = dict(spread=">6.1f", passes="8", loss=">9.5f", value=">9.1e", gradient=">9.1e")
    table = harness.Table(columns)
    for spread in (3.0, 1.0, 0.3):  # cosines near 1 - spread^2
        rng = np.random.default_rng(0)
        centre = rng.normal(size=WIDTH)
        centre /= np.linalg.norm(centre)
        near = [centre + spread * rng.normal(size=(ROWS, WIDTH)) / np.sqrt(WIDTH) for _ in "ab"]
        a, b = ((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32) for x in near)
        x, y = a.astype(np.float64), b.astype(np.float64)
        logits = SCALE * x @ y.T
        highest = logits.max(1, keepdims=True)
        shares = np.exp(logits - highest)
        exact = (highest[:, 0] + np.log(shares.sum(1)) - np.diag(logits)).mean()
        shares /= shares.sum(1, keepdims=True)
        exact_gradient = SCALE * (shares @ y - y) / ROWS
        for name, passes in (("float32", 0), ("six", 6), ("three", 3), ("one", 1)):
            with in_passes(passes):
                fresh = lambda a, b: _loss(a, b)  # which jit has not compiled in other passes
                value, gradient = jax.jit(jax.value_and_grad(fresh))(a, b)
            worst = float(np.abs(gradient - exact_gradient).max() / np.abs(exact_gradient).max())
            row = dict(spread=spread, passes=name, loss=float(exact))
            table.add(**row, value=abs(float(value) - exact), gradient=worst)
    harness.write(args.json, dict(machine=machine, rows=table.rows))


if __name__ == "__main__":
    main()
