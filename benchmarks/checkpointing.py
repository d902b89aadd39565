"""Cost of saving and logging: seconds that training is blocked, until all is on disk, and to restore.

    python -m benchmarks.checkpointing [--sizes S/16 B/16] [--batch 8] [--turns 3] [--folder DIR] [--json OUT.json]

For each size a fresh process trains on the synthetic source (float32 parameters and AdamW moments) and saves as the
trainer does, in turns with np.save and fsync of the same arrays, a file each, and with a blocking save of Orbax.
The share of the training time is for checkpoint_every and log_every of the shipped configs and the measured step.
--folder names the disk to measure.
"""

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from benchmarks import harness
from benchmarks.train_step import PACKED_ROWS, TrainStep, make_config
from grain_jax.config import recipe

STEPS = 2  # before each save
LOGGED = 200  # logged steps a turn


def size_of(folder: epath.Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(size_of(p) if p.is_dir() else p.stat().length for p in folder.iterdir())


def seconds(function: Callable, *args: Any) -> float:
    """Of a call."""
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def save_plainly(state: Any, folder: epath.Path) -> None:
    """np.save and fsync, a file an array."""
    import jax

    folder.mkdir()
    for number, leaf in enumerate(jax.tree.leaves(state)):
        with (folder / f"{number}.npy").open("wb") as file:
            np.save(file, np.asarray(leaf))
            file.flush()
            os.fsync(file.fileno())


def save_by_orbax(state: Any, folder: epath.Path) -> None:
    """A save of Orbax that blocks."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.StandardSave(state._asdict()))


def log(writer: Any, metrics: Any, state: Any) -> None:
    """LOGGED lines as the trainer writes them."""
    from grain_jax.runtime import digests, metrics_writer

    counts = metrics_writer.TextCounts(metrics, max_share=1.0)
    for number in range(LOGGED):
        values = {name: float(value) for name, value in metrics.items()}
        metrics_writer.check_finite(values, 0, number, ())
        values |= counts.add(values) | writer.rates(number, 0.0)
        writer.progress(number, values)
        writer.write(number, values | digests.chains(state.receipt))


def side(size: str, batch: int, folder: str) -> dict[str, Callable]:
    """A callable that runs a turn and returns all turns so far: a dict of seconds (and bytes) each."""
    import jax

    from grain_jax.runtime import checkpoint, metrics_writer, receipt
    from grain_jax.training import sharding

    config = make_config(size, batch)
    step, place = TrainStep(config), epath.Path(folder)
    metrics = step()
    (place / "log").mkdir()
    checkpoints = checkpoint.manager(place / "run", config)
    receipts = receipt.Receipts(place / "run", sharding.make_mesh(config.mesh), config, None)
    placed = checkpoint.placed(step.program.state, step.program.shardings)
    turns: list[dict[str, float]] = []

    def advance() -> None:
        jax.block_until_ready((step(), step.held))

    def turn() -> list[dict[str, float]]:
        out = {"step": statistics.median(seconds(advance) for _ in range(STEPS))}
        began = time.perf_counter()
        record = receipts.add(step.held[0], ())
        out["digests"] = time.perf_counter() - began
        saved = checkpoints.directory / str(int(step.held[0].step))
        began = time.perf_counter()
        out["save"] = seconds(checkpoint.save, checkpoints, step.held[0], config, record)
        meanwhile = []
        while checkpoints.is_saving_in_progress():
            meanwhile.append(seconds(advance))
        out["until on disk, to a step"] = time.perf_counter() - began
        checkpoints.wait_until_finished()
        out["slower steps meanwhile"] = sum(meanwhile) - len(meanwhile) * out["step"]
        out["bytes"] = size_of(saved)
        began = time.perf_counter()
        restored = jax.block_until_ready(checkpoint.restore(saved, placed))
        out["restore"] = time.perf_counter() - began
        out["check restored"] = seconds(receipt.contradictions, record, restored)
        del restored
        ways = {"np.save, fsync": save_plainly, "Orbax, not in the background": save_by_orbax}
        for name, save in ways.items():
            out[name] = seconds(save, step.held[0], place / "plain")
            (place / "plain").rmtree()
        writer = metrics_writer.MetricsWriter(place / "log", 0, LOGGED + 1, batch)
        with contextlib.redirect_stderr(io.StringIO()):
            out["a logged step"] = seconds(log, writer, metrics, step.held[0]) / LOGGED
        writer.close()
        turns.append(out)
        return turns

    return {size: turn}


def main() -> None:
    """Measures each size and prints its table."""
    sizes = (["S/16", "B/16"], dict(choices=recipe.SIZES))
    batch = (8, dict(choices=sorted(PACKED_ROWS)))
    args = harness.arguments(__doc__, sizes=sizes, batch=batch, turns=3, folder=epath.Path)
    machine = harness.machine("jax", "orbax-checkpoint", "tensorstore", "numpy")
    every = dict(checkpoint_every=recipe.base().checkpoint_every, log_every=recipe.base().log_every)
    results = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            given = dict(size=size, batch=args.batch, folder=folder)
            (timing,) = harness.measure({"save": (side, given)}, turns=args.turns).values()
        turns = timing.value[1:]  # the first turn is warm-up
        medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        results[size] = dict(turns=turns, medians=medians)
        print(f"{size}, batch {args.batch}: a checkpoint of {medians.pop('bytes') / 1e6:.0f} MB")
        table = harness.Table(dict(what="30", seconds="<24.4f"))
        for name in medians:
            table.add(what=name, seconds=[turn[name] for turn in turns])
        saving = (medians["digests"] + medians["save"]) / every["checkpoint_every"]
        logging = medians["a logged step"] / every["log_every"]
        print(
            f"saving every {every['checkpoint_every']} steps takes {saving / medians['step']:.3%} of the steps' time,"
            f" logging every {every['log_every']} {logging / medians['step']:.4%}"
        )
    harness.write(args.json, dict(machine=machine, batch=args.batch, **every, results=results))


if __name__ == "__main__":
    main()
