"""Runs commands on this machine, N at a time, for `grain-jax sweep`."""

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from shlex import join
from shutil import which
from statistics import fmean
from typing import NamedTuple

from etils import epath

from grain_jax.core import errors, progress

PREEMPTED = 75  # a run's status: its state is saved, the same command goes on
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


def slots(count: int) -> list[Slot]:
    """`count` equal shares of the GPUs, or of the cores of a machine without one.

    Two runs of one core each are faster than two that share two cores.

    Raises:
      UserError: more slots than GPUs.
    """
    if count == 1:
        return [Slot()]
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] in ("cuda", "gpu"):
        there = [str(i) for i, _ in enumerate(epath.Path("/dev").glob("nvidia[0-9]*"))]
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(there)).split(",")
        if gpus != [""]:
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


@dataclasses.dataclass
class Runner:
    """Runs jobs until each has finished or failed."""

    jobs: list[LocalJob]  # in the order in which they start
    free: list[Slot]  # as many jobs run at a time, each on one of these
    screen: progress.ProgressLine  # gets a line whenever a job starts or ends, and the progress
    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ)  # of the jobs
    done: list[str] = dataclasses.field(default_factory=list)  # names of jobs
    failed: list[str] = dataclasses.field(default_factory=list)
    stopped_by: int | None = None  # the signal that ended them all

    def __post_init__(self):
        self._running: dict[str, tuple[subprocess.Popen, float]] = {}  # and when it was started
        self._took: list[float] = []  # seconds of each whole run that has finished
        self._slots = len(self.free)

    def run(self) -> None:
        """Runs the jobs. Passes SIGTERM and SIGINT on to them and returns when they have ended."""
        handlers = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            with futures.ThreadPoolExecutor(self._slots) as pool:
                jobs = [pool.submit(self._run, job) for job in self.jobs]
                while futures.wait(jobs, timeout=SHOW).not_done:
                    self._show()
            for job in jobs:
                job.result()
            self.screen.close(stays=True)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _run(self, job: LocalJob) -> None:
        """Runs a job until it is not preempted any more."""
        slot = self.free.pop(0)
        while not self.stopped_by and self._try(job, slot) == PREEMPTED:
            pass
        self.free.append(slot)

    def _try(self, job: LocalJob, slot: Slot) -> int:
        """Runs a job once; returns its status."""
        began = time.monotonic()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self.screen.say(f"{job.name}: started")
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
        self._running[job.name] = process, began
        if self.stopped_by:  # the signal came while it was being started
            process.send_signal(self.stopped_by)
        status = process.wait()
        del self._running[job.name]
        seconds = time.monotonic() - began
        took = progress.duration(seconds)
        if status == 0:
            self.done.append(job.name)
            self._took.append(seconds)
            how = f"finished after {took}"
        elif status == PREEMPTED:
            how = f"preempted and saved after {took}"
        elif self.stopped_by and status in (-self.stopped_by, 128 + self.stopped_by):
            how = f"stopped after {took}"
        else:
            self.failed.append(job.name)
            cause = f"killed by {signal.Signals(-status).name}" if status < 0 else f"{status}"
            last = job.log.read_text().strip().splitlines()[-1]
            how = f"FAILED after {took} ({cause}): {last} [{job.log}]"
        self.screen.say(f"{job.name}: {how}")
        return status

    def _stop(self, number: int, _) -> None:
        """Passes a signal on to the jobs, and starts no more."""
        self.stopped_by = number
        for process, _ in list(self._running.values()):
            process.send_signal(number)

    def _show(self) -> None:
        running = dict(self._running)
        eta, ended = "", len(self.done) + len(self.failed)
        # Seconds of whole runs: steps do not show compiling, evaluating and the report.
        if self._took:
            left = fmean(self._took) * (len(self.jobs) - ended)
            left -= sum(time.monotonic() - began for _, began in running.values())
            eta = f", ETA {progress.duration(max(left, 0.0) / self._slots)}"
        counts = f"{len(self.done)} of {len(self.jobs)} runs finished"
        self.screen.show(f"{counts}{eta}; running: {', '.join(running)}")
