"""Compares our train step with one in PyTorch, with packed and with padded texts, in turns in one run.

    python -m benchmarks.train_step [--size B/16] [--batch 8] [--turns 5] [--no-compile] [--json OUT.json]

Texts have the lengths of the synthetic source: captions of 10-20 tokens, 0-5 descriptions of 4-12. All sides have
the same weights and batch, and their losses must agree (dropout off) before anything is timed. PyTorch
(`torch_step`) pads each real text to 77, as the reference does, or packs; each eager and with torch.compile. Our
shapes are static, so our padded variant has a row for each of the 6 texts that an image can have. float32 on a CPU,
bfloat16 on a GPU.
"""

import functools
import math
import os
import sys
from typing import Any

import numpy as np

from benchmarks import harness
from grain_jax import recipe

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


def jax_side(size: str, batch: int) -> dict[str, Any]:
    """Our step: {variant: callable that returns the loss}, and "dropout off": the loss without a step."""
    import jax

    from grain_jax import losses
    from grain_jax.models.grain import GRAIN

    held: list = []
    steps = {
        name: TrainStep(make_config(size, batch, packed=name == "packed"), held)
        for name in ("packed", "padded")
    }
    config = make_config(size, batch)
    model = GRAIN(config.model, config.dtype, config.remat)

    def loss(params, batch):
        outputs = model.apply({"params": params}, batch, None)
        return losses.total_loss(outputs, batch, config.loss).total

    value = float(jax.jit(loss)(held[0].params, steps["packed"].batch))
    return {"dropout off": lambda: value} | {name: step.loss for name, step in steps.items()}


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


def torch_side(size: str, batch: int, compiled: bool) -> dict[str, Any]:
    """The PyTorch step with our initial weights and batch; returns what `jax_side` returns."""
    import torch

    from grain_jax import train
    from grain_jax.input_pipeline import synthetic

    train.keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    step = torch_model(size, "cuda" if torch.cuda.is_available() else "cpu", compiled=compiled)
    data = next(synthetic.batches(make_config(size, batch)))
    placed = {name: step.place(data, packed=name == "packed") for name in ("packed", "padded")}
    with torch.no_grad():
        step.module.eval()
        losses = {f"dropout off {name}": float(step.loss(b)) for name, b in placed.items()}
    out: dict[str, Any] = {name: lambda loss=loss: loss for name, loss in losses.items()}
    return out | {name: functools.partial(step.timed, b) for name, b in placed.items()}


def main() -> int:
    """Checks the losses, times the variants, and prints medians, spread and ratios."""
    args = harness.arguments(
        __doc__,
        size=("B/16", dict(choices=recipe.SIZES)),
        batch=(8, dict(choices=sorted(PACKED_ROWS))),
        turns=5,
        no_compile=(False, dict(help="without torch.compile")),
    )
    given = dict(size=args.size, batch=args.batch)
    sides: dict[str, Any] = {"JAX": (jax_side, given)}
    sides["PyTorch"] = (torch_side, given | dict(compiled=False))
    if not args.no_compile:
        sides["torch.compile"] = (torch_side, given | dict(compiled=True))
    dtype = make_config(args.size, args.batch).dtype
    machine = harness.machine("jax", "torch", about=f"{args.size}, batch {args.batch}, {dtype}")
    # The sides share a GPU: JAX must not take its memory before it needs it.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    timings = harness.measure(sides, turns=args.turns, environment=environment)
    checked = {n: timings.pop(n).value for n in list(timings) if "dropout off" in n}
    worst = harness.agree(checked, TOLERANCE[dtype], "losses before training, dropout off,")
    ours = checked["JAX dropout off"]
    print(f"losses before training, dropout off: {ours:.6f}, worst difference {worst:.1e}")
    wrong = {name: t.value for name, t in timings.items() if not math.isfinite(t.value)}
    if wrong:
        sys.exit(f"losses: {wrong}")
    medians = {name: timing.median for name, timing in timings.items()}
    best = {
        how: min(s for n, s in medians.items() if n.endswith(how) and "JAX" not in n)
        for how in ("padded", "packed")
    }
    columns = dict(step="22", seconds=">24.3f", images_per_second=">18.2f")
    table = harness.Table(columns | dict(of_padded_PyTorch=">18.2f"))
    for name, (seconds, _) in timings.items():
        rate, ratio = args.batch / medians[name], best["padded"] / medians[name]
        table.add(step=name, seconds=seconds, images_per_second=rate, of_padded_PyTorch=ratio)
    ratios = {f"over_{how}": seconds / medians["JAX packed"] for how, seconds in best.items()}
    print(
        f"JAX packed does {ratios['over_padded']:.2f} times the images/s of the faster padded PyTorch step,"
        f" {ratios['over_packed']:.2f} times those of the faster packed one"
    )
    rows = {row.pop("step"): row for row in table.rows}
    harness.write(args.json, dict(machine=machine, **given, table=rows, ratios=ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
