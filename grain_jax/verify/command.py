"""The command `grain-jax verify` (arguments.py): is this run what its receipt says?"""

import math
import os
import sys
from collections.abc import Sequence

import jax
from etils import epath

from grain_jax.core import errors
from grain_jax.runtime import compiled, receipt
from grain_jax.verify import replay, workdir
from grain_jax.verify.arguments import Verify

STEPS = 5  # where no checkpoint says how far
MOST_DEVICES = 512  # virtual ones; each has threads of its own, and a record may say any number


def verify(folder: epath.PathLike, *, start: int | None = None, steps: int | None = None) -> None:
    """Checks a workdir and prints what was found.

    Args:
      folder: the workdir of a run that has saved at least once.
      start: the step of a kept checkpoint to train again from, or 0; None: the oldest kept one that
        something follows.
      steps: how many; None: up to the next kept checkpoint.

    Raises:
      Mismatch: the run is not what it claims to be.
      UserError: it cannot be checked: no records, no such checkpoint, no data, nothing to compare.
    """
    run = workdir.read(epath.Path(folder))
    workdir.check_metrics(run)
    workdir.check_config(run)
    first = _first_step(run, start)
    last = _last_step(run, first, steps)
    place = replay.Place()
    workdir.check_data(run)
    replay.check_checkpoints(run, place)
    proved = replay.replay(run, place, first, last)
    print(
        f"\nVerdict: {folder} is the run that its receipt describes."
        f" {workdir.steps_in_words(first + 1, last).capitalize()}: {proved}."
    )


def _first_step(run: workdir.Told, start: int | None) -> int:
    kept = sorted(run.kept)
    if start is None:
        reached = max([*kept[1:], *run.metrics], default=0)
        return kept[0] if reached > kept[0] else 0
    if start and start not in run.kept:
        raise errors.UserError(
            f"--from: got {start}, expected 0 or one of the kept checkpoints, {', '.join(map(str, kept))}"
        )
    return start


def _last_step(run: workdir.Told, first: int, steps: int | None) -> int:
    after = [step for step in run.kept if step > first]
    there = [*run.metrics, *(record["step"] for record in run.records)]
    newest = max(there)
    if steps is None and after and first:
        last = min(after)
    elif steps is None:
        last = min(first + STEPS, newest) if newest > first else first + STEPS
    else:
        last = first + steps
        if last > newest > first:
            raise errors.UserError(
                f"--steps: got {steps}, expected at most {newest - first}: nothing is recorded of the steps"
                f" after {newest}"
            )
    if not any(first < step <= last for step in there):
        raise errors.UserError(
            f"{workdir.steps_in_words(first + 1, last)}: nothing is recorded of them; take --from 0, or another --steps"
        )
    return last


def _recorded_devices(folder: epath.Path) -> int:
    """The largest number of CPU devices of the run; 0 for other devices, for too many to imitate, or bad records."""
    try:
        records = [receipt.record_of(line, receipt.FILE) for line in receipt.read(folder)]
        on_cpu = [r["mesh"] for r in records if r["environment"]["platform"] == "cpu"]
        count = max((math.prod(mesh.values()) for mesh in on_cpu), default=0)
    except (KeyError, ValueError, OSError):
        return 0
    return count if 0 < count <= MOST_DEVICES else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and verifies; 0: proved, 1: not."""
    args = Verify.parse(arguments)
    compiled.use()
    devices = _recorded_devices(epath.Path(args.workdir))
    if devices and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)  # virtual ones, as the run had
    try:
        verify(args.workdir, start=args.start, steps=args.steps)
    except workdir.Mismatch as mismatch:
        print(f"\nVerdict: {args.workdir} is NOT the run that its receipt describes:", flush=True)
        print(mismatch, file=sys.stderr)
        return 1
    return 0
