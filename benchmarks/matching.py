"""Time of the matching of queries and regions: ours, optax under jit, and SciPy through a host callback.

    python -m benchmarks.matching [--images 128] [--turns 20] [--json OUT.json]

For every shape (queries x regions, of which a random number is real) the three solve the same costs in turns in one
process, and their total costs must agree.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from benchmarks import harness
from grain_jax.losses import matching

SHAPES = ((5, 5), (6, 6), (8, 8), (10, 10), (20, 10), (50, 20), (100, 20))


def by_optax(cost, mask):
    """The query of each region, by optax; padded regions cost nothing."""
    cost = jnp.where(mask[:, None], cost, 0.0)

    def one(cost):
        row, column = optax.assignment.hungarian_algorithm(cost)
        return jnp.zeros(cost.shape[1], jnp.int32).at[column].set(row.astype(jnp.int32))

    return jax.vmap(one)(cost)


def by_scipy(cost, mask) -> np.ndarray:
    """The query of each region, int32 [B, R]; padded regions have 0."""
    out = np.zeros(mask.shape, np.int32)
    for matrix, real, row in zip(np.asarray(cost), np.asarray(mask), out):
        query, region = scipy.optimize.linear_sum_assignment(matrix[:, real])
        row[np.flatnonzero(real)[region]] = query
    return out


def by_callback(cost, mask):
    """The query of each region, by SciPy on the host, called from the compiled program."""
    return jax.pure_callback(by_scipy, jax.ShapeDtypeStruct(mask.shape, jnp.int32), cost, mask)


WAYS = {
    "ours": lambda cost, mask: matching.match(cost, mask).query_index,
    "optax": by_optax,
    "SciPy callback": by_callback,
}


def total_cost(query, cost, mask) -> np.ndarray:
    """Total cost of the assignment of each image, float64 [B]."""
    picked = np.take_along_axis(cost.astype(np.float64), np.asarray(query)[:, None], axis=1)[:, 0]
    return np.where(mask, picked, 0).sum(1)


def main() -> None:
    """Times the three for each shape and prints medians."""
    args = harness.arguments(__doc__, images=128, turns=20)
    about = f"{args.images} images, float32, {jax.devices()[0].device_kind}"
    machine = harness.machine("jax", "optax", "scipy", about=about)
    print("ms: median (least - most)")
    columns = dict(queries=">7", regions=">8") | dict.fromkeys(WAYS, ">26.2f")
    table, rng = harness.Table(columns, scale=1e3), np.random.default_rng(0)
    for queries, regions in SHAPES:
        cost = rng.normal(size=(args.images, queries, regions)).astype(np.float32)
        mask = np.arange(regions) < rng.integers(0, regions + 1, (args.images, 1))
        given = jax.device_put((cost, mask))
        compiled = {name: jax.jit(way).lower(cost, mask).compile() for name, way in WAYS.items()}
        totals = {name: total_cost(run(*given), cost, mask) for name, run in compiled.items()}
        harness.agree(totals, 1e-5, f"{queries} x {regions}: total costs")
        solve = lambda run, given=given: jax.block_until_ready(run(*given))
        runs = {name: functools.partial(solve, run) for name, run in compiled.items()}
        timings = harness.in_turns(runs, turns=args.turns, warm_up=0)
        seconds = {name: timing.seconds for name, timing in timings.items()}
        table.add(queries=queries, regions=regions, **seconds)
    harness.write(args.json, dict(machine=machine, images=args.images, rows=table.rows))


if __name__ == "__main__":
    main()
