"""Ends a tiny run at seeded moments, again and again by the same command; its metrics are those of one left alone."""

import collections
import contextlib
import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests import runs
from tests.paths import ROOT

pytestmark = pytest.mark.slow
PATIENCE = 300  # seconds that a process may take to get somewhere, or to end


class Fault(NamedTuple):
    """A signal, and when it comes: in "start" (imports to compilation), in a "save", or after some "step"."""

    number: signal.Signals
    moment: str


KILL, TERM = signal.SIGKILL, signal.SIGTERM
FAULTS = [Fault(KILL, "step"), Fault(KILL, "save"), Fault(KILL, "start"), Fault(TERM, "save")]


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
        changes = {"total_steps": self.steps, "checkpoint_every": 5, "checkpoint_keep": 3}
        command = runs.command(self.folder / name, changes | runs.SMALL)
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
        assert status == 0, f"see {self.folder / name}.log"

    def strike(self, name: str, fault: Fault) -> None:
        """Starts the run and lets the fault happen."""
        process = self.start(name)
        try:
            self._strike(name, fault, process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def _strike(self, name: str, fault: Fault, process: subprocess.Popen) -> None:
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
            not self._started(name, began) or self._lines(name) <= max(self._kept(name), default=0)
        )
        assert process.poll() is None, "it ended before the fault could happen"
        os.kill(process.pid, fault.number)
        status = process.wait(PATIENCE)
        allowed = (-KILL,) if fault.number == KILL else (75, -TERM) if in_start else (75,)
        assert status in allowed, f"{fault}: status {status}; see {self.folder / name}.log"
        # What a save leaves that was cut off; one that is told to end finishes it.
        self.count["in a save"] += fault.number == KILL and self._saving(name, began)
        self.count["in the start"] += in_start

    def _wait(self, process: subprocess.Popen, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert process.poll() is None and time.monotonic() < deadline, "no fault could happen"
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

    def _kept(self, name: str) -> list[int]:
        found = (self.folder / name / "checkpoints").glob("*")
        return sorted(int(path.name) for path in found if path.name.isdigit())

    def _lines(self, name: str) -> int:
        path = self.folder / name / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0


def _start_of(pid: int) -> float:
    """When a process started, in seconds of time.time()."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return time.time() - time.monotonic() + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def test_a_run_that_is_ended_again_and_again_has_the_metrics_of_one_left_alone(tmp_path):
    run = Drill(tmp_path, 15 * len(FAULTS) + 30, random.Random(0))
    run.finish("left_alone")
    for fault in FAULTS:
        run.strike("ended", fault)
    assert run._lines("ended") < run.steps  # not over before the last fault
    run.finish("ended")
    assert runs.lines(tmp_path / "ended") == runs.lines(tmp_path / "left_alone")
    assert run._kept("ended") == run._kept("left_alone")
    assert run.count["in a save"] >= 1 and run.count["in the start"] >= 1


def _start(workdir, folder):
    command = runs.command(workdir, {"total_steps": 30, **runs.SMALL})
    environment = runs.on_one_device(folder / "compiled")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run that was left alone."""
    folder = tmp_path_factory.mktemp("double")
    alone = _start(folder / "alone", folder)
    said = alone.communicate()[1]
    assert alone.returncode == 0, said
    return folder


@pytest.mark.parametrize("number", range(4))
def test_of_two_at_once_one_trains_as_if_alone(folder, number):
    workdir = folder / str(number)
    pair = [_start(workdir, folder) for _ in range(2)]
    said = [process.communicate()[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 2], "\n".join(said)
    refused, first = sorted(pair, key=lambda process: -process.returncode)
    line = said[pair.index(refused)].strip()
    assert line.startswith(f"{workdir}: process {first.pid} on ") and "\n" not in line
    assert runs.lines(workdir) == runs.lines(folder / "alone")
    saved = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert saved == ["28", "30"] and not (workdir / "trainer.lock").exists()
