"""Compares our train step with one in PyTorch on the device that is there, with packed and with padded texts.

    python -m benchmarks.train_step [--size B/16] [--batch 8] [--turns 5] [--attention xla] [--no-compile]
        [--json OUT.json]

Texts have the lengths of the synthetic source: captions of 10-20 tokens, 0-5 descriptions of 4-12. All sides
have the same weights and batch, and their losses must agree (dropout off). PyTorch (`torch_step`) pads each
text to 77, as the reference does, or packs; each eager and compiled. On a CPU (float32) the sides take turns,
and our padded variant, whose shapes are static, has a row for each of an image's 6 texts. On a GPU or TPU
(bfloat16) a side has the device's memory to itself, a turn is ten steps, and ours packs, as MFU counts.
"""

import functools
import importlib.util
import math
import os
import statistics
import sys
from typing import Any

import jax
import numpy as np

from benchmarks import harness, our_step, stopwatch
from grain_jax.config import recipe
from grain_jax.input_pipeline import synthetic
from grain_jax.train import flops, optim, run, sharding
from grain_jax.train.train_step import init_state

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the losses


def torch_side(size: str, batch: int, compiled: bool, steps: int) -> dict[str, Any]:
    """The PyTorch step with our initial weights and batch, in bfloat16 on a GPU; as `our_step.side`."""
    import torch

    from benchmarks import torch_step
    from grain_jax.convert.reference import commands as torch_module
    from grain_jax.convert.reference import names

    run.keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")
    cuda, config = torch.cuda.is_available(), our_step.make_config(size, batch)
    tx = optim.optimizer(config.optim, lambda step: 0.0)
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.jit(lambda: sharding.unbox(init_state(config, tx)).params)()
    state = names.reference_state(config.model, jax.tree.map(np.asarray, params))
    module = torch_module.make_module(config.model, state)
    autocast = torch.bfloat16 if cuda else None
    module = module.to("cuda" if cuda else "cpu")
    step = torch_step.TorchStep(module, compiled=compiled, autocast=autocast)
    data = next(synthetic.batches(config))
    placed = {name: step.on_device(data, packed=name == "packed") for name in ("packed", "padded")}
    with torch.no_grad():
        module.eval()
        before = {f"dropout off {n}": dict(loss=float(step.loss(b))) for n, b in placed.items()}

    def turn(batch: Any) -> dict[str, Any]:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            loss = step.step(batch)
        return dict(loss=loss, peak_bytes=torch.cuda.max_memory_allocated() if cuda else None)

    out: dict[str, Any] = {name: lambda value=value: value for name, value in before.items()}
    return out | {name: functools.partial(turn, batch) for name, batch in placed.items()}


def measure(args: Any, platform: str, steps: int) -> dict[str, stopwatch.Timing]:
    """The timings of all sides: in turns on a CPU, one after the other on a device that each fills."""
    options = dict(size=args.size, batch=args.batch, steps=steps)
    sides: dict[str, Any] = {
        f"JAX {name}": (our_step.side, options | dict(attention=name)) for name in args.attention
    }
    if platform == "tpu" or importlib.util.find_spec("torch") is None:
        print("PyTorch: left out, not installed or not of this device", flush=True)
    else:
        if platform == "cpu":
            sides["PyTorch"] = (torch_side, options | dict(compiled=False))
        if not args.no_compile:
            sides["torch.compile"] = (torch_side, options | dict(compiled=True))
    groups = [sides] if platform == "cpu" else [{name: side} for name, side in sides.items()]
    timings: dict[str, stopwatch.Timing] = {}
    for group in groups:
        timings |= stopwatch.measure(group, args.turns)
    return timings


def main() -> None:
    """Checks the losses, times the variants, and prints medians, spread and ratios."""
    args = harness.arguments(
        __doc__,
        size=("B/16", dict(choices=recipe.SIZES)),
        batch=(8, dict(choices=[*our_step.PACKED_ROWS, 256])),
        turns=5,
        attention=(["auto"], dict(help="programs of `model.attention`, a side each")),
        no_compile=(False, dict(help="without torch.compile")),
    )
    platform, kind = harness.device()
    steps = 1 if platform == "cpu" else 10
    dtype = "float32" if platform == "cpu" else "bfloat16"
    machine = harness.machine("jax", about=f"{args.size}, batch {args.batch}, {dtype}, {kind}")
    timings = measure(args, platform, steps)
    checked = {n: timings.pop(n).value["loss"] for n in list(timings) if "dropout off" in n}
    worst = stopwatch.agree(checked, TOLERANCE[dtype], "losses before training, dropout off,")
    ours = next(iter(checked.values()))
    print(f"losses before training, dropout off: {ours:.6f}, worst difference {worst:.1e}")
    wrong = {n: t.value["loss"] for n, t in timings.items() if not math.isfinite(t.value["loss"])}
    if wrong:
        sys.exit(f"losses: {wrong}")
    peak = flops.peak_flops(kind, dtype)
    each = flops.per_image(our_step.make_config(args.size, args.batch, dtype=dtype)).train
    columns = dict(step="22", seconds=">26.4f", images_per_second=">18.2f", mfu=">7.1%")
    table = harness.Table(columns | dict(peak_gb=">8.2f"))
    for name, timing in timings.items():
        seconds = [s / steps for s in timing.seconds]
        rate = args.batch / statistics.median(seconds)
        row: dict[str, Any] = dict(step=name, seconds=seconds, images_per_second=rate)
        row |= dict(mfu=rate * each / peak) if peak else {}
        most = timing.value["peak_bytes"]
        table.add(**row, **(dict(peak_gb=most / 1e9) if most else {}))
    rates = {row["step"]: row["images_per_second"] for row in table.rows}
    best = max(rate for name, rate in rates.items() if name.startswith("JAX"))
    theirs = {name: rate for name, rate in rates.items() if not name.startswith("JAX")}
    ratios = {name: best / rate for name, rate in theirs.items()}
    if ratios:
        said = ", ".join(f"{ratio:.2f} times those of {n}" for n, ratio in ratios.items())
        print(f"our fastest step does images/s: {said}")
    about = dict(machine=machine, device=kind, size=args.size, batch=args.batch)
    harness.write(args.json, about | dict(rows=table.rows, ratios=ratios))


if __name__ == "__main__":
    main()
