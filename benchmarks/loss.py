"""Time and memory of the contrastive losses: streamed (ours), and from the matrix of all similarities.

    python -m benchmarks.loss [--batches 256 1024 4096] [--turns 7] [--json OUT.json]

Value and gradient of L_ic + L_rd (5 regions an image) with respect to all embeddings, on one device, in turns in
one process. Both use HIGHEST precision, and their values must agree. `benchmarks.scale` compiles both for 256 chips.
"""

import argparse
import dataclasses
import functools
import sys

import jax
import numpy as np

from benchmarks import scale, side_by_side
from grain_jax import config as config_lib
from grain_jax import losses, recipe

WIDTH = 512  # of the embeddings
REGIONS = 5


def _value(run, outputs, batch) -> float:
    return float(jax.block_until_ready(run(outputs, batch))[0])


def main() -> int:
    """Times both for each batch size and prints medians, spread and temporaries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    machine = side_by_side.machine("jax")
    settings = recipe.base("tiny")
    settings.total_steps, settings.optim.warmup_steps = 1, 0
    config = dataclasses.replace(config_lib.from_dict(settings).loss, box=0.0)

    def streamed(outputs, batch):
        return losses.total_loss(outputs, batch, config).total

    def materialised(outputs, batch):
        return sum(scale.materialised_losses(outputs, batch, outputs.logit_scale))

    ways = {"streamed": streamed, "materialised": materialised}
    print(f"D = {WIDTH}, float32, {jax.devices()[0].device_kind}; {side_by_side.on(machine)}")
    print(
        f"{'images':>7} {'losses':14} {'seconds: median (least - most)':>32} {'temporaries MB':>15}"
    )
    rows = []
    for images in args.batches:
        outputs, batch = jax.device_put(scale.problem(images, REGIONS, WIDTH))
        compiled = {
            n: jax.jit(jax.value_and_grad(f)).lower(outputs, batch).compile()
            for n, f in ways.items()
        }
        runs = {n: functools.partial(_value, run, outputs, batch) for n, run in compiled.items()}
        timings = side_by_side.in_turns(runs, turns=args.turns)
        values = {name: timing.value for name, timing in timings.items()}
        if not np.isclose(*values.values(), rtol=1e-5):
            print(f"{images} images: the losses differ, {values}", file=sys.stderr)
            return 1
        for name, run in compiled.items():
            megabytes = run.memory_analysis().temp_size_in_bytes / 1e6
            turns = timings[name].seconds
            rows.append(dict(images=images, losses=name, seconds=turns, temporaries_mb=megabytes))
            print(
                f"{images:7} {name:14} {side_by_side.spread(turns, digits=3):>32} {megabytes:15,.1f}",
                flush=True,
            )
    side_by_side.write(args.json, dict(machine=machine, rows=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
