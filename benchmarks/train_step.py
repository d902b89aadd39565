"""Compares our train step with one in PyTorch, with packed and with padded texts, in turns in one run.

    python -m benchmarks.train_step [--size B/16] [--batch 8] [--steps 5] [--json OUT.json]

Texts have the lengths of the synthetic source: captions of 10-20 tokens, 0-5 descriptions of 4-12. All sides have
the same weights and batch, and their losses must agree (dropout off) before anything is timed. PyTorch
(`torch_step`) pads each real text to 77, as the reference does, or packs; each eager and with torch.compile. Our
shapes are static, so our padded variant has a row for each of the 6 texts that an image can have. float32 on a CPU, bfloat16 on a GPU.
"""

import argparse
import functools
import math
import sys
from typing import Any

import numpy as np

from benchmarks import side_by_side
from grain_jax import recipe

# Images a group -> rows that hold the texts of 99.9% of the groups (benchmarks.packing).
PACKED_ROWS = {8: 5, 16: 9, 32: 17, 64: 33, 128: 63}
TOLERANCE = 1e-4  # of the losses, float32; bfloat16 3e-2


def make_config(size: str, batch: int, **text) -> Any:
    """The recipe at that size, on one device and the synthetic source."""
    import jax

    from grain_jax import config as config_lib

    c = recipe.base(size)
    c.total_steps, c.optim.warmup_steps = 1000, 10
    c.batch_size, c.input.lanes, c.input.source = batch, 1, "synthetic"
    c.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    c.mesh.data = 1
    c.text.update(text)
    return config_lib.from_dict(c)


def texts(batch: int) -> dict[str, dict[str, Any]]:
    """Variant -> its keys of `config.text`."""
    group = min(batch, 128)
    return {
        "packed": dict(packing=True, pack_group=group, pack_rows=PACKED_ROWS[group]),
        "padded": dict(packing=False),
    }


def jax_side(size: str, batch: int) -> dict[str, Any]:
    """Our step: {variant: callable that returns the loss}, and "dropout off": the loss without a step."""
    import jax

    from grain_jax import train
    from grain_jax.input_pipeline import synthetic
    from grain_jax.models.grain import GRAIN
    from grain_jax.training import optim, sharding, train_step

    train.keep_freed_memory()
    state, out = None, {}

    def run(step, on_device):
        nonlocal state
        state, metrics = step(state, on_device)
        return float(metrics["loss"])

    for name, text in texts(batch).items():
        config = make_config(size, batch, **text)
        model = GRAIN(config.model, config.dtype, config.remat)
        schedule = optim.learning_rate(config.optim, total_steps=1000, steps_per_epoch=100)
        tx = optim.optimizer(config.optim, schedule)
        if state is None:
            state = jax.jit(lambda: sharding.unbox(train_step.init_state(model, config, tx)))()  # noqa: B023
        on_device = jax.device_put(next(synthetic.batches(config)))
        if name == "packed":
            loss = jax.jit(functools.partial(_loss, model, config))(state.params, on_device)
            out["dropout off"] = lambda loss=float(loss): loss
        step = jax.jit(train_step.make_train_step(model, config, tx, schedule), donate_argnums=0)
        out[name] = functools.partial(run, step.lower(state, on_device).compile(), on_device)
    return out


def _loss(model, config, params, batch):
    from grain_jax import losses

    return losses.total_loss(model.apply({"params": params}, batch, None), batch, config.loss).total


def torch_model(size: str, device: str, *, compiled: bool) -> Any:
    """The `TorchStep` with our initial weights on "cpu" or "cuda", there in bfloat16 autocast."""
    import jax
    import torch

    from benchmarks import torch_step
    from grain_jax.convert.reference import module as torch_module
    from grain_jax.convert.reference.parameters import to_states
    from grain_jax.models.grain import GRAIN
    from grain_jax.training import optim, sharding, train_step

    config = make_config(size, 8, **texts(8)["packed"])
    model = GRAIN(config.model)
    tx = optim.optimizer(
        config.optim, optim.learning_rate(config.optim, total_steps=2, steps_per_epoch=1)
    )
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.jit(lambda: sharding.unbox(train_step.init_state(model, config, tx)).params)()
    module = torch_module.make_module(config.model, None)
    torch_module.load_states(module, to_states(config.model, jax.tree.map(np.asarray, params)))
    autocast = torch.bfloat16 if device == "cuda" else None
    return torch_step.TorchStep(module.to(device), compiled=compiled, autocast=autocast)


def torch_side(size: str, batch: int, compiled: bool) -> dict[str, Any]:
    """The PyTorch step with our initial weights and batch; returns what `jax_side` returns."""
    import os

    import torch

    from benchmarks import torch_step
    from grain_jax import train
    from grain_jax.input_pipeline import synthetic

    train.keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = torch_model(size, device, compiled=compiled)
    data = next(synthetic.batches(make_config(size, batch, **texts(batch)["packed"])))
    out: dict[str, Any] = {}
    placed = {p: step.place(data, packed=p == "packed") for p in ("packed", "padded")}
    with torch.no_grad():
        step.module.eval()
        losses = {name: float(step.loss(batch)) for name, batch in placed.items()}
    out |= {f"dropout off {name}": lambda loss=loss: loss for name, loss in losses.items()}
    return out | {name: torch_step.timed(step, batch) for name, batch in placed.items()}


def main() -> int:
    """Checks the losses, times the variants, and prints medians, spread and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="B/16", choices=recipe.SIZES)
    parser.add_argument("--batch", type=int, default=8, choices=sorted(PACKED_ROWS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--json")
    args = parser.parse_args()
    machine = side_by_side.machine("jax", "torch")
    common_arguments = dict(size=args.size, batch=args.batch)
    sides: dict[str, Any] = {"JAX": (jax_side, common_arguments)}
    for name, compiled in (("PyTorch", False), ("torch.compile", True)):
        if not (compiled and args.no_compile):
            sides[name] = (torch_side, dict(common_arguments, compiled=compiled))
    # The sides share a GPU: JAX must not take its memory before it needs it.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    timings = side_by_side.measure(sides, turns=args.steps, environment=environment)
    checked = {n: timings.pop(n).value for n in list(timings) if "dropout off" in n}
    ours = checked["JAX dropout off"]
    worst = max(abs(value - ours) / abs(ours) for value in checked.values())
    print(f"{args.size}, batch {args.batch}, float32; {side_by_side.on(machine)}")
    print(f"losses before training, dropout off: {ours:.6f}, worst difference {worst:.1e}")
    if not worst < TOLERANCE:
        print(*(f"  {name}: {value}" for name, value in checked.items()), sep="\n", file=sys.stderr)
        return 1
    best_padded = min(
        t.median for n, t in timings.items() if n.endswith("padded") and "JAX" not in n
    )
    best_packed = min(
        t.median for n, t in timings.items() if n.endswith("packed") and "JAX" not in n
    )
    print(
        f"{'step':22} {'seconds: median (least - most)':>32} {'images/s':>9} {'of padded PyTorch':>18}"
    )
    table = {}
    for name, timing in timings.items():
        if not math.isfinite(timing.value):
            print(f"{name}: loss {timing.value}", file=sys.stderr)
            return 1
        table[name] = dict(seconds=timing.seconds, images_per_second=args.batch / timing.median)
        print(
            f"{name:22} {side_by_side.spread(timing.seconds, digits=3):>32}"
            f" {args.batch / timing.median:9.2f} {best_padded / timing.median:17.2f}x"
        )
    ours = timings["JAX packed"].median
    ratios = dict(over_padded=best_padded / ours, over_packed=best_packed / ours)
    print(
        f"JAX packed does {ratios['over_padded']:.2f} times the images/s of the faster padded PyTorch step,"
        f" {ratios['over_packed']:.2f} times those of the faster packed one"
    )
    result = dict(machine=machine, size=args.size, batch=args.batch, table=table, ratios=ratios)
    side_by_side.write(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
