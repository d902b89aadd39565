"""Runs commands on this machine, N at a time, for `grain-jax sweep`."""

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from shlex import join
from shutil import which
from statistics import fmean
from typing import NamedTuple

from etils import epath

from grain_jax.core import errors, progress

PREEMPTED = 75  # a run's status: its state is saved, the same command goes on
POLL = 0.5  # seconds between two looks at the processes
SHOW = 5.0  # between two lines of progress


class LocalJob(NamedTuple):
    """One command; the same command resumes it."""

    name: str
    command: Sequence[str]
    log: epath.Path  # on this machine; what it prints is added to it


class Slot(NamedTuple):
    """A share of this machine for one job."""

    prefix: tuple[str, ...] = ()  # stands before its command
    environment: Mapping[str, str] = {}


class _Try(NamedTuple):
    """A job that runs."""

    job: LocalJob
    slot: Slot
    process: subprocess.Popen
    began: float


def slots(count: int) -> list[Slot]:
    """`count` equal shares of the GPUs, or of the cores of a machine without one.

    Two runs of one core each are faster than two that share two cores.

    Raises:
      UserError: more slots than GPUs.
    """
    if count == 1:
        return [Slot()]
    if gpus := _gpus():
        if count > len(gpus):
            raise errors.UserError(
                f"{count} runs at a time: expected at most the {len(gpus)} GPU(s) of this machine"
            )
        shares = [",".join(gpus[i::count]) for i in range(count)]
        return [Slot(environment={"CUDA_VISIBLE_DEVICES": share}) for share in shares]
    if not which("taskset"):  # not Linux
        return [Slot() for _ in range(count)]
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i % len(cores) :: count] or [cores[i % len(cores)]] for i in range(count)]
    return [Slot(("taskset", "--cpu-list", ",".join(map(str, share)))) for share in shares]


def _gpus() -> list[str]:
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    there = [str(i) for i, _ in enumerate(epath.Path("/dev").glob("nvidia[0-9]*"))]
    return [
        gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(there)).split(",") if gpu
    ]


@dataclasses.dataclass
class Runner:
    """Runs jobs until each has finished or failed.

    Attributes:
      waiting: the jobs, in the order in which they should start.
      free: as many jobs run at a time, each on one of these.
      screen: gets a line whenever a job starts or ends, and the progress.
      ready: whether a job may start beside the running ones of these names.
      environment: of the jobs.
      done, failed: names of jobs.
      stopped_by: the signal that ended them all, or None.
    """

    waiting: list[LocalJob]
    free: list[Slot]
    screen: progress.ProgressLine
    ready: Callable[[LocalJob, frozenset[str]], bool] = lambda job, running: True
    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ)
    done: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    stopped_by: int | None = None

    def __post_init__(self):
        self._running: list[_Try] = []
        self._took: list[float] = []  # seconds of each whole run that has finished
        self._slots = len(self.free)

    def run(self) -> None:
        """Runs the jobs. Passes SIGTERM and SIGINT on to them and returns when they have ended."""
        handlers = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        shown = time.monotonic()
        try:
            while True:
                for ended in [x for x in self._running if x.process.poll() is not None]:
                    self._end(ended)
                for job in list(self.waiting):
                    running = frozenset(x.job.name for x in self._running)
                    if self.free and not self.stopped_by and self.ready(job, running):
                        self._start(job)
                if not self._running and (self.stopped_by or not self.waiting):
                    break
                if time.monotonic() - shown > SHOW:
                    self._show()
                    shown = time.monotonic()
                time.sleep(POLL)
            self.screen.close(stays=True)
        finally:  # whatever ended the loop, no job is left without a runner
            for running in self._running:
                running.process.terminate()
            for running in self._running:
                running.process.wait()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _start(self, job: LocalJob) -> None:
        slot = self.free.pop(0)
        self.waiting.remove(job)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a") as log:
            log.write(f"$ {join(job.command)}\n")
            log.flush()
            process = subprocess.Popen(
                [*slot.prefix, *job.command],
                env={**self.environment, **slot.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches it once: by `_stop`
            )
        self._running.append(_Try(job, slot, process, time.monotonic()))
        if self.stopped_by:  # the signal came while it was being started
            process.send_signal(self.stopped_by)
        self.screen.say(f"{job.name}: started")

    def _end(self, ended: _Try) -> None:
        """Records a job that has ended."""
        self._running.remove(ended)
        self.free.append(ended.slot)
        job, status, seconds = ended.job, ended.process.returncode, time.monotonic() - ended.began
        took = progress.duration(seconds)
        if status == 0:
            self.done.append(job.name)
            self._took.append(seconds)
            how = f"finished after {took}"
        elif status == PREEMPTED:
            self.waiting.append(job)
            how = f"preempted and saved after {took}"
        elif self.stopped_by and status in (-self.stopped_by, 128 + self.stopped_by):
            how = f"stopped after {took}"
        else:
            self.failed.append(job.name)
            cause = f"killed by {signal.Signals(-status).name}" if status < 0 else f"{status}"
            last = job.log.read_text().strip().splitlines()[-1]
            how = f"FAILED after {took} ({cause}): {last} [{job.log}]"
        self.screen.say(f"{job.name}: {how}")

    def _stop(self, number: int, _) -> None:
        """Passes a signal on to the jobs, and starts no more."""
        self.stopped_by = number
        for running in self._running:
            running.process.send_signal(number)

    def _show(self) -> None:
        eta, now = "", time.monotonic()
        if (
            self._took
        ):  # seconds of whole runs; steps do not show compiling, evaluating and the report
            left = fmean(self._took) * (len(self._running) + len(self.waiting))
            left -= sum(now - job.began for job in self._running)
            eta = f", ETA {progress.duration(max(left, 0.0) / self._slots)}"
        names = ", ".join(x.job.name for x in self._running)
        every = len(self.done) + len(self.failed) + len(self._running) + len(self.waiting)
        counts = f"{len(self.done)} of {every} runs finished"
        self.screen.show(f"{counts}{eta}; running: {names}")
