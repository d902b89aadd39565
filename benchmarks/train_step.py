"""The train step with packed texts against padded texts, interleaved in one run.

    python -m benchmarks.train_step [--size B/16] [--batch 8] [--steps 5] [--json OUT.json]

Texts have the synthetic source's lengths: captions of 10-20 tokens, 0-5 descriptions of 4-12. "padded"
pads each of the 1 + 5 texts a picture can have to a row of 77; "padded, real texts" has only as many
rows as there are texts (what a padding code base with ragged batches computes); "packed" shares rows.
"""

import argparse
import json
import platform
import time

import jax
import numpy as np
from etils import epath

from configs import common
from grain_jax import config as config_lib
from grain_jax import optim, sharding, train, train_step
from grain_jax.input_pipeline import packing, synthetic
from grain_jax.models.grain import GRAIN


def make_config(size: str, batch: int, **text) -> config_lib.Config:
    """The recipe at that size, in float32, on one device and the synthetic source."""
    c = common.base(size)
    c.total_steps, c.optim.warmup_steps = 1000, 10
    c.batch_size, c.input.lanes, c.input.source = batch, 1, "synthetic"
    c.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    c.mesh.data = 1
    c.text.update(text)
    return config_lib.from_dict(c)


def compile_step(config: config_lib.Config, state=None):
    """(compiled step, a batch, fresh state if none was given)."""
    model = GRAIN(config.model, config.dtype, config.remat)
    schedule = optim.learning_rate(config.optim, total_steps=1000, steps_per_epoch=100)
    tx = optim.optimizer(config.optim, schedule)
    if state is None:
        state = jax.jit(lambda: sharding.unbox(train_step.init_state(model, config, tx)))()
    batch = next(synthetic.batches(config))
    share = packing.padding_share(batch.text_segments)
    batch = jax.device_put(batch)
    step = jax.jit(train_step.make_train_step(model, config, tx, schedule), donate_argnums=0)
    return step.lower(state, batch).compile(), batch, state, share


def main() -> None:
    """Times the variants in turn and prints medians, spread and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="B/16", choices=common.SIZES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=epath.Path)
    args = parser.parse_args()
    train.keep_freed_memory()

    # On average 2.5 of 5 descriptions are real: 3.5 rows a picture; packed rows fit 99.9% of groups.
    rows_packed = {8: 5, 16: 9, 32: 17, 64: 33, 128: 63}
    if args.batch not in rows_packed:
        parser.error(
            f"--batch: got {args.batch}, expected one of {', '.join(map(str, rows_packed))}"
        )
    variants = {
        "padded": dict(packing=False),
        "padded, real texts": dict(
            packing=True, pack_group=args.batch, pack_rows=7 * args.batch // 2
        ),
        "packed": dict(packing=True, pack_group=args.batch, pack_rows=rows_packed[args.batch]),
    }
    steps, state, seconds = {}, None, {name: [] for name in variants}
    for name, text in variants.items():
        config = make_config(args.size, args.batch, **text)
        compiled, batch, state, share = compile_step(config, state)
        steps[name] = compiled, batch, share
    for turn in range(args.steps + 1):
        for name, (compiled, batch, _) in steps.items():
            began = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics)
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - began)

    base = np.median(seconds["padded"])
    print(f"{args.size}, batch {args.batch}, {jax.devices()[0].device_kind}, {config.dtype}")
    print(
        f"{'texts':20} {'rows':>5} {'median s':>9} {'min':>7} {'max':>7} {'images/s':>9} {'of padded':>10}"
    )
    table = {}
    for name, times in seconds.items():
        rows = int(np.prod(steps[name][1].text_tokens.shape[:2]))
        median = float(np.median(times))
        table[name] = dict(rows=rows, seconds=times, ratio=median / base)
        print(
            f"{name:20} {rows:5} {median:9.3f} {min(times):7.3f} {max(times):7.3f}"
            f" {args.batch / median:9.2f} {median / base:10.2f}"
        )
    print(f"padding in the packed rows: {steps['packed'][2]:.0%}")
    if args.json:
        machine = dict(
            platform=platform.platform(), jax=jax.__version__, device=str(jax.devices()[0])
        )
        args.json.write_text(json.dumps(dict(machine=machine, table=table), indent=2) + "\n")


if __name__ == "__main__":
    main()
