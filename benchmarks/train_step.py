"""Compares our train step with one in PyTorch on the device that is there, with packed and with padded texts.

    python -m benchmarks.train_step [--size B/16] [--batch 8] [--turns 5] [--attention xla] [--no-compile] [--json OUT.json]

Texts have the lengths of the synthetic source: captions of 10-20 tokens, 0-5 descriptions of 4-12. All sides have
the same weights and batch, and their losses must agree (dropout off). PyTorch (`torch_step`) pads each real text to 77,
as the reference does, or packs; each eager and with torch.compile. On a CPU (float32) the sides take turns, and our
padded variant, whose shapes are static, has a row for each of the 6 texts that an image can have. On a GPU or TPU
(bfloat16) a side has the memory of the device to itself, a turn is ten steps, and ours packs; MFU is of the packed model.
"""

import functools
import importlib.util
import math
import os
import statistics
import sys
from typing import Any

import numpy as np

from benchmarks import harness
from grain_jax.config import recipe

# Images a group -> rows that hold the texts of 99.9% of the groups (benchmarks.packing).
PACKED_ROWS = {8: 5, 16: 9, 32: 17, 64: 33, 128: 63}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the losses


def make_config(size: str, batch: int, *, packed: bool = True, **changes: Any) -> Any:
    """The recipe at that size, on one device and the synthetic source, its texts packed or padded."""
    import jax

    group = min(batch, 128)
    rows = {"text.pack_group": group, "text.pack_rows": PACKED_ROWS[group]} if packed else {}
    keys = {"batch_size": batch, "input.source": "synthetic", "mesh.data": 1}
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return harness.config(size, keys | rows | {"text.packing": packed, "dtype": dtype} | changes)


class TrainStep:
    """The compiled step of the trainer on the first device, with a synthetic batch; a call does a step.

    Args:
      config: for one device.
      held: a list with the state, which steps of one model may share; empty for a fresh one.
    """

    def __init__(self, config: Any, held: list | None = None):
        import jax

        from grain_jax import train
        from grain_jax.input_pipeline import device, synthetic
        from grain_jax.training import sharding, train_step

        chip = jax.devices()[0]
        if chip.platform == "cpu":
            train.keep_freed_memory()
        mesh = sharding.make_mesh(config.mesh, [chip])
        self.program = train_step.build(config, mesh, total_steps=1000, steps_per_epoch=100.0)
        self.compiled = self.program.step.lower(self.program.state, self.program.batch).compile()
        batch = next(synthetic.batches(config))
        self.batch = device.shard_batch(batch, self.program.batch_sharding)
        self.held = [] if held is None else held
        if not self.held:
            self.held.append(self.program.init())

    def __call__(self) -> dict[str, Any]:
        """Returns the metrics, still on the device."""
        self.held[0], metrics = self.compiled(self.held[0], self.batch)
        return metrics

    def loss(self) -> float:
        """Does a step and waits for its loss."""
        return float(self()["loss"])


def jax_side(size: str, batch: int, attention: str, steps: int) -> dict[str, Any]:
    """Our step: {variant: callable that does `steps` steps}, and "dropout off": the loss without a step."""
    import jax

    from grain_jax import losses
    from grain_jax.models.grain import GRAIN

    held: list = []
    chip = jax.devices()[0]
    ways = ("packed", "padded") if chip.platform == "cpu" else ("packed",)
    make = functools.partial(make_config, size, batch, **{"model.attention": attention})
    made = {name: TrainStep(make(packed=name == "packed"), held) for name in ways}
    config = make()
    model = GRAIN(config.model, config.dtype, config.remat)

    def loss(params, batch):
        outputs = model.apply({"params": params}, batch, None)
        return losses.total_loss(outputs, batch, config.loss).total

    def turn(step: TrainStep) -> dict[str, Any]:
        for _ in range(steps):
            metrics = step()
        jax.block_until_ready((metrics, held))
        peak = (chip.memory_stats() or {}).get("peak_bytes_in_use")
        return dict(loss=float(metrics["loss"]), peak_bytes=peak)

    before = dict(loss=float(jax.jit(loss)(held[0].params, made["packed"].batch)))
    turns = {name: functools.partial(turn, step) for name, step in made.items()}
    return {"dropout off": lambda: before} | turns


def torch_model(size: str, device: str, *, compiled: bool) -> Any:
    """The `TorchStep` with our initial weights on "cpu" or "cuda", there in bfloat16 autocast."""
    import jax
    import torch

    from benchmarks import torch_step
    from grain_jax.convert.reference import module as torch_module
    from grain_jax.convert.reference.names import to_states
    from grain_jax.models.grain import GRAIN
    from grain_jax.training import optim, sharding, train_step

    config = make_config(size, 8)
    model, tx = GRAIN(config.model), optim.optimizer(config.optim, lambda step: 0.0)
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.jit(lambda: sharding.unbox(train_step.init_state(model, config, tx)).params)()
    module = torch_module.make_module(config.model, None)
    torch_module.load_states(module, to_states(config.model, jax.tree.map(np.asarray, params)))
    autocast = torch.bfloat16 if device == "cuda" else None
    return torch_step.TorchStep(module.to(device), compiled=compiled, autocast=autocast)


def torch_side(size: str, batch: int, compiled: bool, steps: int) -> dict[str, Any]:
    """The PyTorch step with our initial weights and batch; returns what `jax_side` returns."""
    import torch

    from grain_jax import train
    from grain_jax.input_pipeline import synthetic

    train.keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")
    cuda = torch.cuda.is_available()
    step = torch_model(size, "cuda" if cuda else "cpu", compiled=compiled)
    data = next(synthetic.batches(make_config(size, batch)))
    placed = {name: step.place(data, packed=name == "packed") for name in ("packed", "padded")}
    with torch.no_grad():
        step.module.eval()
        before = {f"dropout off {n}": dict(loss=float(step.loss(b))) for n, b in placed.items()}

    def turn(batch: Any) -> dict[str, Any]:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            loss = step.timed(batch)
        return dict(loss=loss, peak_bytes=torch.cuda.max_memory_allocated() if cuda else None)

    out: dict[str, Any] = {name: lambda value=value: value for name, value in before.items()}
    return out | {name: functools.partial(turn, batch) for name, batch in placed.items()}


def measure(args: Any, platform: str, steps: int) -> dict[str, harness.Timing]:
    """The timings of all sides: in turns on a CPU, one after the other on a device that each fills."""
    given = dict(size=args.size, batch=args.batch, steps=steps)
    sides: dict[str, Any] = {
        f"JAX {name}": (jax_side, given | dict(attention=name)) for name in args.attention
    }
    if platform == "tpu" or importlib.util.find_spec("torch") is None:
        print("PyTorch: left out, not installed or not of this device", flush=True)
    else:
        if platform == "cpu":
            sides["PyTorch"] = (torch_side, given | dict(compiled=False))
        if not args.no_compile:
            sides["torch.compile"] = (torch_side, given | dict(compiled=True))
    groups = [sides] if platform == "cpu" else [{name: side} for name, side in sides.items()]
    timings: dict[str, harness.Timing] = {}
    for group in groups:
        timings |= harness.measure(group, turns=args.turns)
    return timings


def main() -> None:
    """Checks the losses, times the variants, and prints medians, spread and ratios."""
    args = harness.arguments(
        __doc__,
        size=("B/16", dict(choices=recipe.SIZES)),
        batch=(8, dict(choices=[*PACKED_ROWS, 256])),
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
    worst = harness.agree(checked, TOLERANCE[dtype], "losses before training, dropout off,")
    ours = next(iter(checked.values()))
    print(f"losses before training, dropout off: {ours:.6f}, worst difference {worst:.1e}")
    wrong = {n: t.value["loss"] for n, t in timings.items() if not math.isfinite(t.value["loss"])}
    if wrong:
        sys.exit(f"losses: {wrong}")
    from grain_jax.training import flops  # needs no device

    peak = flops.peak_flops(kind, dtype)
    each = flops.per_image(make_config(args.size, args.batch, dtype=dtype)).train
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
