"""What keys of a config cost: time and FLOPs of the step with each set, against the config as it is, in turns.

    python -m benchmarks.variants loss.image_description=1 ... [--config demo] [--turns 30] [--json OUT.json]

One device, the synthetic source, a batch that lies in memory. A turn runs each variant once; the ratio of times is the
median of the ratios within the turns, so that what else runs on the machine counts on both sides.
"""

import argparse
import dataclasses
import statistics
import sys
from typing import Any, NamedTuple

import jax

from benchmarks import side_by_side
from grain_jax import config as config_lib
from grain_jax import train
from grain_jax.cli import config_file
from grain_jax.input_pipeline import derived, synthetic
from grain_jax.models.grain import GRAIN
from grain_jax.training import flops, optim, sharding, train_step


class Variant(NamedTuple):
    """A step to time.

    Attributes:
      run: a step; returns the loss.
      model_flops: of a step, forward and backward, nothing computed twice.
      flops: of the step as written, recomputation included.
    """

    run: Any
    model_flops: float
    flops: float


def read(given: str, keys: list[str]) -> config_lib.Config:
    """The config with the keys (`loss.box=2`), on one device and the synthetic source."""
    config = config_file.load(given, [f"--config.{key}" for key in keys])
    config = dataclasses.replace(
        config,
        input=dataclasses.replace(config.input, source="synthetic", lanes=1),
        mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1),
    )
    return derived.planned(config, derived.Place())[0]


def make(config: config_lib.Config) -> Variant:
    """The compiled step with a state and a batch of its own."""
    model = GRAIN(config.model, config.dtype, config.remat)
    schedule = optim.learning_rate(config.optim, total_steps=1000, steps_per_epoch=100)
    tx = optim.optimizer(config.optim, schedule)
    state = jax.jit(lambda: sharding.unbox(train_step.init_state(model, config, tx)))()
    batch = jax.device_put(next(synthetic.batches(config)))
    step = train_step.make_train_step(model, config, tx, schedule)
    written = flops.matmul_flops(step, state, batch)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    held = [state]

    def run() -> float:
        held[0], metrics = compiled(held[0], batch)
        return float(metrics["loss"])

    return Variant(run, flops.per_image(config).train * config.batch_size, written)


def main() -> int:
    """Times the variants and prints medians, spread and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("keys", nargs="+", help="KEY=VALUE; those of one variant joined by commas")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--json")
    args = parser.parse_args()
    machine = side_by_side.machine("jax")
    train.keep_freed_memory()
    base = "as it is"
    configs = {base: read(args.config, [])}
    configs |= {keys: read(args.config, keys.split(",")) for keys in args.keys}
    variants = {name: make(config) for name, config in configs.items()}
    runs = {name: variant.run for name, variant in variants.items()}
    timings = side_by_side.in_turns(runs, turns=args.turns)
    print(f"{args.config}, {jax.devices()[0].device_kind}; {side_by_side.on(machine)}")
    print(
        f"{'variant':34} {'seconds: median (least - most)':>32} {'time':>7} {'model FLOPs':>12}"
        f" {'as written':>11}"
    )
    rows = {}
    for name, timing in timings.items():
        pairs = zip(timing.seconds, timings[base].seconds)
        row = dict(
            seconds=timing.seconds,
            time=statistics.median(mine / theirs for mine, theirs in pairs),
            model_flops=variants[name].model_flops / variants[base].model_flops,
            flops=variants[name].flops / variants[base].flops,
            loss=timing.value,
        )
        rows[name] = row
        print(
            f"{name:34} {side_by_side.spread(timing.seconds, digits=3):>32} {row['time']:7.3f}"
            f" {row['model_flops']:12.4f} {row['flops']:11.4f}"
        )
    side_by_side.write(args.json, dict(machine=machine, config=args.config, rows=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
