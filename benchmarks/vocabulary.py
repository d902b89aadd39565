"""Time and memory of the cross-entropy over a vocabulary: in tiles (ours), and from all logits.

    python -m benchmarks.vocabulary [--tokens 512 2048] [--rows 49408] [--tile 4096] [--turns 5] [--json OUT.json]

Value and gradient with respect to features and table, width 512, in turns in one process on one device. The values must
agree. The temporaries are beside the gradients, which the tiles use before they are written.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, stopwatch
from grain_jax.losses import streaming, vocabulary

WIDTH = 512  # of the features


def dense(features, table, targets):
    """The loss of each token from all of its logits."""
    logits = streaming.similarity(features, table)
    own = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - own


def timed(output: harness.Table, tokens: int, rows: int, tile: int, turns: int) -> None:
    """Adds the seconds and temporaries of both."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    given = normal(tokens, WIDTH), WIDTH**-0.5 * normal(rows, WIDTH)
    given = jax.device_put((*given, rng.integers(0, rows, tokens).astype(np.int32)))
    ways = {
        "tiles": lambda *x: vocabulary.cross_entropy(*x, tile=tile).loss.mean(),
        "all logits": lambda *x: dense(*x).mean(),
    }
    compiled = {
        name: jax.jit(jax.value_and_grad(way, (0, 1))).lower(*given).compile()
        for name, way in ways.items()
    }
    run = lambda program: float(jax.block_until_ready(program(*given))[0])
    runs = {name: functools.partial(run, program) for name, program in compiled.items()}
    timings = stopwatch.in_turns(runs, turns)
    values = {name: timing.value for name, timing in timings.items()}
    stopwatch.agree(values, 1e-5, f"{tokens} tokens: the losses")
    for name, program in compiled.items():
        memory = program.memory_analysis().temp_size_in_bytes / 1e6
        seconds = timings[name].seconds
        output.add(tokens=tokens, logits=name, seconds=seconds, temporaries_mb=memory)


def main() -> None:
    """Prints a row for each number of tokens and way."""
    args = harness.arguments(__doc__, tokens=[512, 2048], rows=49408, tile=4096, turns=5)
    about = f"width {WIDTH}, float32, {args.rows:,} rows, {jax.devices()[0].device_kind}"
    machine = harness.machine("jax", about=about)
    columns = dict(tokens=">8,", logits="12", seconds=">28.3f", temporaries_mb=">15,.1f")
    table = harness.Table(columns)
    for tokens in args.tokens:
        timed(table, tokens, args.rows, args.tile, args.turns)
    harness.write(args.json, dict(machine=machine, rows=table.rows))


if __name__ == "__main__":
    main()
