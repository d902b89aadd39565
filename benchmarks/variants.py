"""What keys of a config cost: time and FLOPs of the step with each set, against the config as it is, in turns.

    python -m benchmarks.variants loss.image_description=1 ... [--config demo] [--turns 30] [--json OUT.json]

One device, the synthetic source, a batch that lies in memory; the keys of one variant are joined by commas. A turn
runs each variant once; the ratio of times is the median of the ratios within the turns, so that what else runs on the
machine counts on both sides. FLOPs: of the model (forward and backward, nothing computed twice), and of the step as
written, recomputation included.
"""

import dataclasses
import statistics

import jax

from benchmarks import harness, stopwatch
from benchmarks.our_step import TrainStep
from grain_jax import config as config_lib
from grain_jax.cli import config_file
from grain_jax.input_pipeline import derived
from grain_jax.training import flops


def read(given: str, keys: list[str]) -> config_lib.Config:
    """The config with the keys (`loss.box=2`), on one device and the synthetic source."""
    config = config_file.load(given, [f"--config.{key}" for key in keys])
    config = dataclasses.replace(
        config,
        input=dataclasses.replace(config.input, source="synthetic", lanes=1),
        mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1),
    )
    return derived.planned(config, derived.Place())[0]


def main() -> None:
    """Times the variants and prints medians, spread and ratios."""
    keys = (str, dict(nargs="+", metavar="KEY=VALUE"))
    args = harness.arguments(__doc__, command=keys, config="demo", turns=30)
    about = f"{args.config}, {jax.devices()[0].device_kind}"
    machine, base = harness.machine("jax", about=about), "as it is"
    configs = {base: read(args.config, [])}
    configs |= {given: read(args.config, given.split(",")) for given in args.command}
    count = lambda program: flops.matmul_flops(program.step, program.state, program.batch)
    steps = {name: TrainStep(config) for name, config in configs.items()}
    counted = {
        name: (flops.per_image(config).train * config.batch_size, count(steps[name].program))
        for name, config in configs.items()
    }
    runs = {name: step.loss for name, step in steps.items()}
    timings = stopwatch.in_turns(runs, args.turns)
    columns = dict(variant="34", seconds=">24.3f", time=">7.3f", model_flops=">12.4f")
    table = harness.Table(columns | dict(flops=">11.4f"))
    for name, timing in timings.items():
        pairs = zip(timing.seconds, timings[base].seconds)
        time = statistics.median(mine / theirs for mine, theirs in pairs)
        model, written = (mine / theirs for mine, theirs in zip(counted[name], counted[base]))
        found = dict(seconds=timing.seconds, time=time, model_flops=model, flops=written)
        table.add(variant=name, **found, loss=timing.value)
    rows = {row.pop("variant"): row for row in table.rows}
    harness.write(args.json, dict(machine=machine, config=args.config, rows=rows))


if __name__ == "__main__":
    main()
