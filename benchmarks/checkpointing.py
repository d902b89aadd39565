"""Cost of saving and logging: seconds that training is blocked, until all is on disk, and to restore.

    python -m benchmarks.checkpointing [--sizes S/16 B/16] [--batch 8] [--turns 3] [--folder DIR] [--json OUT.json]

For each size a fresh process trains on the synthetic source (float32 parameters and AdamW moments) and saves as the
trainer does, in turns with np.save and fsync of the same arrays, a file each, and with a blocking save of Orbax.
The share of the training time is for checkpoint_every and log_every of the shipped configs and the measured step; the
last figure is the shortest step at which it stays under 1%.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from benchmarks import side_by_side, train_step
from grain_jax import recipe

STEPS = 2  # before each save
LOGGED = 200  # logged steps a turn
LIMIT = 0.01  # largest share of the training time for saving and logging


def size_of(folder: epath.Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(size_of(p) if p.is_dir() else p.stat().length for p in folder.iterdir())


def checkpointing_side(size: str, batch: int, folder: str) -> dict[str, Callable]:
    """A callable that runs a turn and returns all turns so far: a dict of seconds (and bytes) each."""
    import jax
    import orbax.checkpoint as ocp

    from grain_jax import train
    from grain_jax.input_pipeline import synthetic
    from grain_jax.runtime import checkpoint, digests, metrics_writer, receipt
    from grain_jax.training import sharding
    from grain_jax.training import train_step as train_step_lib

    train.keep_freed_memory()
    config = train_step.make_config(size, batch, **train_step.texts(batch)["packed"])
    mesh = sharding.make_mesh(config.mesh)
    program = train_step_lib.build(config, mesh, total_steps=1000, steps_per_epoch=100)
    step = program.step.lower(program.state, program.batch).compile()
    on_device = jax.device_put(next(synthetic.batches(config)), program.batch_sharding)
    state, metrics = step(program.init(), on_device)
    place = epath.Path(folder)
    (place / "log").mkdir()
    checkpoints = checkpoint.manager(place / "run", config)
    receipts = receipt.Receipts(place / "run", mesh, config, None)
    placed = checkpoint.placed(program.state, program.shardings)
    turns: list[dict[str, float]] = []

    def seconds(function: Callable, *args: Any) -> float:
        began = time.perf_counter()
        function(*args)
        return time.perf_counter() - began

    def advance() -> None:
        nonlocal state, metrics
        state, metrics = jax.block_until_ready(step(state, on_device))

    def save() -> None:
        checkpoint.save(checkpoints, state, config, record)

    def restore() -> None:
        nonlocal restored
        restored = jax.block_until_ready(checkpoint.restore(saved, placed))

    def plain(where: epath.Path) -> None:
        where.mkdir()
        for number, leaf in enumerate(jax.tree.leaves(state)):
            with (where / f"{number}.npy").open("wb") as file:
                np.save(file, np.asarray(leaf))
                file.flush()
                os.fsync(file.fileno())

    def orbax(where: epath.Path) -> None:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(where, args=ocp.args.StandardSave(state._asdict()))

    def log(writer: metrics_writer.MetricsWriter) -> None:
        for number in range(LOGGED):
            values = {name: float(value) for name, value in metrics.items()}
            metrics_writer.check_finite(values, 0, number, ())
            values |= writer.rates(number, 0.0)
            writer.progress(number, values)
            writer.write(number, values | digests.chains(state.receipt))

    def turn() -> list[dict[str, float]]:
        nonlocal record, saved, restored
        out = {"step": statistics.median(seconds(advance) for _ in range(STEPS))}
        began = time.perf_counter()
        record = receipts.add(state, ())
        out["digests"] = time.perf_counter() - began
        saved = checkpoints.directory / str(int(state.step))
        began = time.perf_counter()
        out["save"] = seconds(save)
        finished: list[float] = []

        def watch() -> None:
            while checkpoints.is_saving_in_progress():
                time.sleep(0.01)
            finished.append(time.perf_counter())

        watcher = threading.Thread(target=watch)
        watcher.start()
        meanwhile = []
        while watcher.is_alive():
            meanwhile.append(seconds(advance))
        checkpoints.wait_until_finished()
        out["until on disk"] = finished[0] - began
        out["slower steps meanwhile"] = sum(meanwhile) - len(meanwhile) * out["step"]
        out["bytes"] = size_of(saved)
        out["restore"] = seconds(restore)
        out["check restored"] = seconds(receipt.contradictions, record, restored)
        restored = None
        for name, write in (("np.save, fsync", plain), ("Orbax, not in the background", orbax)):
            where = place / "plain"
            out[name] = seconds(write, where)
            where.rmtree()
        writer = metrics_writer.MetricsWriter(place / "log", 0, LOGGED + 1, batch)
        with contextlib.redirect_stderr(io.StringIO()):
            out["a logged step"] = seconds(log, writer) / LOGGED
        writer.close()
        turns.append(out)
        return turns

    record = saved = restored = None
    return {size: turn}


def shares(seconds: dict[str, float], saves_every: int, logs_every: int) -> dict[str, float]:
    """The shares of the training time that saving and logging take, and the shortest step that keeps them under 1%.

    Args:
      seconds: medians of the entries of a turn.
      saves_every: steps between checkpoints.
      logs_every: steps between log lines.

    Returns: `saving` and `logging`, shares of the time of the steps, and `least_step`, in seconds.
    """
    saving = (seconds["digests"] + seconds["save"]) / saves_every
    logging = seconds["a logged step"] / logs_every
    return dict(
        saving=saving / seconds["step"],
        logging=logging / seconds["step"],
        least_step=(saving + logging) / LIMIT,
    )


def main() -> int:
    """Measures each size and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=recipe.SIZES, default=["S/16", "B/16"])
    parser.add_argument("--batch", type=int, default=8, choices=sorted(train_step.PACKED_ROWS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--folder", type=epath.Path, help="on the disk to measure; default: temporary"
    )
    parser.add_argument("--json", type=epath.Path)
    args = parser.parse_args()
    machine = side_by_side.machine("jax", "orbax-checkpoint", "tensorstore", "numpy")
    shipped = recipe.base()
    print(side_by_side.on(machine))
    results = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            side = (checkpointing_side, dict(size=size, batch=args.batch, folder=folder))
            (timing,) = side_by_side.measure({"save": side}, turns=args.turns).values()
        turns = timing.value[1:]  # the first turn is warm-up
        medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        found = shares(medians, shipped.checkpoint_every, shipped.log_every)
        results[size] = dict(turns=turns, medians=medians, shares=found)
        print(f"{size}, batch {args.batch}: a checkpoint of {medians['bytes'] / 1e6:.0f} MB")
        print(f"  {'seconds':30} median (least - most)")
        for name in medians:
            if name != "bytes":
                print(f"  {name:30} {side_by_side.spread([t[name] for t in turns], digits=4)}")
        print(
            f"  saving every {shipped.checkpoint_every} steps takes {found['saving']:.3%} of the steps' time,"
            f" logging every {shipped.log_every} {found['logging']:.4%}; together under 1% where a step takes"
            f" {found['least_step'] * 1000:.0f} ms or more"
        )
    result = dict(
        machine=machine,
        batch=args.batch,
        checkpoint_every=shipped.checkpoint_every,
        log_every=shipped.log_every,
        results=results,
    )
    side_by_side.write(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
