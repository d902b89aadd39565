"""Ends a tiny run at seeded moments, again and again, and compares its metrics with those of a run left alone.

    python -m tests.faults.drill [--kills 25] [--terms 10] [--seed 0]

Every restart is the same command; nothing is mended by hand. Prints what was done, when, and how long it took.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from tests import runs

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds that a process may take to get somewhere, or to end
CHECKPOINT_EVERY = 5


class Fault(NamedTuple):
    """A signal, and when it comes: in "start" (imports to compilation), in a "save", or after some "step"."""

    number: signal.Signals
    moment: str


def plan(kills: int, terms: int, rng: random.Random) -> list[Fault]:
    """That many SIGKILLs and SIGTERMs: a third of each in a save, a fifth in the start; one kill follows a kill."""
    faults = []
    for number, count in ((signal.SIGKILL, kills), (signal.SIGTERM, terms)):
        saves, starts = -(-count // 3), -(-count // 5)
        moments = ["save"] * saves + ["start"] * starts + ["step"] * (count - saves - starts)
        faults += [Fault(number, moment) for moment in moments[:count]]
    rng.shuffle(faults)
    pair = [Fault(signal.SIGKILL, "save"), Fault(signal.SIGKILL, "start")]
    if all(fault in faults for fault in pair):  # the double kill
        for fault in pair:
            faults.remove(fault)
        faults[1:1] = pair
    return faults


class Drill:
    """A run that is ended by faults.

    Args:
      folder: for the workdirs, the logs and the compiled programs.
      steps: the length of the run.
      rng: of the moments.
    """

    def __init__(self, folder: pathlib.Path, steps: int, rng: random.Random):
        self.folder, self.rng, self.steps = folder, rng, steps
        self.count = collections.Counter()
        self.start_seconds = 0.0

    def start(self, name: str) -> subprocess.Popen:
        """The command of the run in that workdir; the same at every restart."""
        changes = {"total_steps": self.steps, "checkpoint_every": CHECKPOINT_EVERY}
        changes |= {"checkpoint_keep": 3, **runs.SMALL}
        command = runs.command(self.folder / name, changes)
        environment = runs.on_one_device(self.folder / "compiled")
        with (self.folder / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def finish(self, name: str) -> None:
        """Runs to the end."""
        began = time.monotonic()
        lines = self._lines(name)
        process = self.start(name)
        while self._lines(name) == lines and process.poll() is None:
            time.sleep(0.01)
        self.start_seconds = time.monotonic() - began
        status = process.wait(PATIENCE)
        if status:
            raise SystemExit(f"{name}: ended with {status}; see {self.folder / name}.log")

    def strike(self, name: str, fault: Fault) -> str:
        """Starts the run and lets the fault happen. Returns what happened, in words."""
        process = self.start(name)
        try:
            return self._strike(name, fault, process)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise SystemExit(f"{fault}: {error}; see {self.folder / name}.log") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def _strike(self, name: str, fault: Fault, process: subprocess.Popen) -> str:
        began = _start_of(process.pid)
        if fault.moment == "start":
            # At some time of the start, but however fast this one is, while it compiles.
            latest = time.monotonic() + self.rng.uniform(0.1, 1) * self.start_seconds
            compiling = self.rng.uniform(0, 0.5)
            self._wait(process, lambda: time.monotonic() > latest or self._started(name, began))
            if self._started(name, began):
                time.sleep(compiling)
        else:
            self._wait(process, lambda: self._started(name, began))
            lines = self._lines(name) + self.rng.randint(1, 9)
            self._wait(process, lambda: self._lines(name) >= lines)
        if fault.moment == "save":
            self._wait(process, lambda: self._saving(name, began))
            time.sleep(self.rng.uniform(0, 0.03))
        in_start = fault.moment == "start" and (
            not self._started(name, began) or self._lines(name) <= self._newest(name)
        )
        if process.poll() is not None:
            raise TimeoutError(f"status {process.poll()} before the fault could happen")
        os.kill(process.pid, fault.number)
        status = process.wait(PATIENCE)
        if fault.number == signal.SIGTERM and status not in (75, -15 if in_start else 75):
            raise SystemExit(f"{fault}: status {status}; see {self.folder / name}.log")
        # What a save leaves that was cut off; one that is told to end finishes it.
        in_save = fault.number == signal.SIGKILL and self._saving(name, began)
        self.count[fault.number.name] += 1
        self.count["in a save"] += in_save
        self.count["in the start"] += in_start
        where = "in a save" if in_save else "in the start" if in_start else "after a step"
        return f"{fault.number.name} {where}, status {status}, {self._lines(name)} lines"

    def _wait(self, process: subprocess.Popen, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"status {process.poll()} before the fault could happen")
            time.sleep(0.001)

    def _started(self, name: str, began: float) -> bool:
        """Whether the process that began then has put metrics.jsonl in order, right before it compiles."""
        path = self.folder / name / "metrics.jsonl"
        return path.exists() and path.stat().st_ctime > began

    def _saving(self, name: str, began: float) -> bool:
        """Whether there is an unfinished checkpoint that was begun after that time."""
        for path in (self.folder / name / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                if path.stat().st_ctime > began:
                    return True
        return False

    def _newest(self, name: str) -> int:
        found = (self.folder / name / "checkpoints").glob("*")
        return max((int(path.name) for path in found if path.name.isdigit()), default=0)

    def _lines(self, name: str) -> int:
        path = self.folder / name / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0


def _start_of(pid: int) -> float:
    """When a process started, in seconds of time.time()."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return time.time() - time.monotonic() + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def drill(folder: pathlib.Path, *, kills: int, terms: int, seed: int) -> collections.Counter:
    """One run left alone, one ended by faults; raises SystemExit where they differ.

    Returns:
      How often what happened.
    """
    rng = random.Random(seed)
    faults = plan(kills, terms, rng)
    run = Drill(folder, 15 * len(faults) + 30, rng)
    run.finish("left_alone")
    for number, fault in enumerate(faults, start=1):
        words = run.strike("ended", fault)
        print(f"{number}/{len(faults)}: {words}", flush=True)
        double = number > 1 and faults[number - 2].number == fault.number == signal.SIGKILL
        run.count["double kill"] += double and fault.moment == "start"
    if run._lines("ended") >= run.steps:
        raise SystemExit("the run was over before the last fault")
    run.finish("ended")
    ended, alone = runs.lines(folder / "ended"), runs.lines(folder / "left_alone")
    if ended != alone:
        differing = [b["step"] for a, b in zip(ended, alone) if a != b][:5]
        raise SystemExit(f"{len(ended)} and {len(alone)} lines; they differ at steps {differing}")
    kept = [
        sorted(path.name for path in (folder / name / "checkpoints").iterdir())
        for name in ("ended", "left_alone")
    ]
    if kept[0] != kept[1]:
        raise SystemExit(f"checkpoints: {kept[0]}, expected {kept[1]}")
    print(f"{len(alone)} lines of metrics.jsonl are equal in all fields but timings", flush=True)
    return run.count


def main() -> None:
    """The drill of the command line."""
    parser = argparse.ArgumentParser(prog="tests.faults.drill", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="SIGKILLs")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERMs")
    parser.add_argument("--seed", type=int, default=0)
    args, began = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="drill_", ignore_cleanup_errors=True) as folder:
        count = drill(pathlib.Path(folder), **vars(args))
    print(f"in all: {dict(count)}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
