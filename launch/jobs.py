"""Runs commands on this machine, N at a time, resumable; for `grain-jax sweep` and `benchmarks.claim`.

A job that is finished is skipped, one that failed is started again after the others, one that was preempted
(status 75) goes back into the queue. A job's process holds a lock on its log for as long as it lives, so that
a runner that was killed outright leaves no run that the next call would start a second time.
"""

import dataclasses
import fcntl
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from shlex import join
from shutil import which
from typing import NamedTuple

from etils import epath

from grain_jax import errors, progress
from grain_jax.cli.process import USAGE_ERROR

PREEMPTED = 75  # a run's status: its state is saved, the same command goes on
POLL = 0.5  # seconds between two looks at the processes
SLOW_POLL = 5.0  # between two looks at files
LEAST_FOR_ETA = 0.1  # jobs' worth of work; before it, starting and compiling are most of the time


@dataclasses.dataclass(frozen=True)
class Job:
    """One command; the same command again goes on where it stopped."""

    name: str
    command: Sequence[str]
    log: epath.Path  # on this machine; what it prints is added to it


class Slot(NamedTuple):
    """A share of this machine for one job."""

    prefix: tuple[str, ...] = ()  # stands before its command
    environment: Mapping[str, str] = {}


class Outcome(NamedTuple):
    """The state of the jobs when `run` returns."""

    done: list[str]
    failed: dict[str, str]  # name -> how its last try ended
    stopped_by: int | None  # the signal that ended them all


def slots(count: int) -> list[Slot]:
    """`count` equal shares of the GPUs, or of the cores of a machine without one.

    Two runs of one core each are faster than two that share two cores.

    Raises:
      UserError: more slots than GPUs.
    """
    if count == 1:
        return [Slot()]
    gpus = _gpus()
    if gpus:
        if count > len(gpus):
            raise errors.UserError(
                f"{count} runs at a time: expected at most the {len(gpus)} GPU(s) of this machine"
            )
        return [
            Slot(environment={"CUDA_VISIBLE_DEVICES": ",".join(gpus[i::count])})
            for i in range(count)
        ]
    if not which("taskset"):  # not Linux
        return [Slot()] * count
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i % len(cores) :: count] or [cores[i % len(cores)]] for i in range(count)]
    return [Slot(("taskset", "--cpu-list", ",".join(map(str, share)))) for share in shares]


def _gpus() -> list[str]:
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if not which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(i) for i, _ in enumerate(gpus)]


@dataclasses.dataclass
class _Running:
    job: Job
    slot: int
    process: subprocess.Popen
    began: float


@dataclasses.dataclass
class Runner:
    """Runs jobs until each has finished or has failed more than `retries` times.

    Attributes:
      jobs: gives all of them in the order in which they should start; asked again whenever one has ended,
        since what is done may make new ones known.
      finished: whether a job needs no run any more.
      slots: as many jobs run at a time, each on one of these.
      screen: gets a line whenever a job starts or ends, and the progress.
      ready: whether a job may start beside the running ones of these names, here or elsewhere.
      share_done: how much of a running job is done, 0 to 1; for the ETA.
      result: what to say of a job that has finished, in a few words.
      retries: how often a job that fails is started again; wrong usage (status 2) never is.
      environment: of the jobs.
    """

    jobs: Callable[[], Sequence[Job]]
    finished: Callable[[Job], bool]
    slots: Sequence[Slot]
    screen: progress.Line
    ready: Callable[[Job, frozenset[str]], bool] = lambda job, running: True
    share_done: Callable[[Job], float] = lambda job: 0.0
    result: Callable[[Job], str] = lambda job: ""
    retries: int = 1
    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ)

    def __post_init__(self):
        self._known: list[Job] = []
        self._done: list[str] = []
        self._failures: dict[str, list[str]] = {}  # name -> how each try ended
        self._started: set[str] = set()
        self._elsewhere: set[str] = set()  # another call's processes are at work on them
        self._running: dict[str, _Running] = {}
        self._stopped_by: int | None = None
        self._given = 0.0  # jobs' worth of work that calls before this one did

    def run(self) -> Outcome:
        """Runs the jobs. Passes SIGTERM and SIGINT on to them and returns when they have ended."""
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._refresh()
            if self._done:
                self.screen.say(f"{len(self._done)} of {len(self._known)} runs finished before")
            self._given = len(self._done)
            began = shown = looked = time.monotonic()
            while True:
                now = time.monotonic()
                if self._reap() or now - looked > SLOW_POLL:
                    self._refresh()
                    looked = now
                self._start_what_can()
                if not self._running and (self._stopped_by or not self._waiting()):
                    break
                if now - shown > SLOW_POLL:
                    self._show(now - began)
                    shown = now
                time.sleep(POLL)
            self.screen.close(stays=True)
        finally:  # whatever ended the loop, no job is left without a runner
            for other in self._running.values():
                other.process.terminate()
            for other in self._running.values():
                other.process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        failed = {
            name: tries[-1]
            for name, tries in self._failures.items()
            if name not in self._done and len(tries) > self.retries
        }
        return Outcome(self._done, failed, self._stopped_by)

    def _refresh(self) -> None:
        """Lists the jobs, and checks those that are new or run elsewhere."""
        seen = {job.name for job in self._known}
        self._known = list(self.jobs())
        for job in self._known:
            if job.name in self._elsewhere or job.name not in seen and job.name not in self._done:
                if self.finished(job):
                    self._elsewhere.discard(job.name)
                    self._done.append(job.name)
                else:
                    self._look_elsewhere(job)

    def _look_elsewhere(self, job: Job) -> None:
        """Notes whether the process of another call works on a job; that job then takes a slot."""
        if job.log.exists():
            with job.log.open() as log:
                try:  # not for ourselves alone: two that look do not see each other
                    fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._note_elsewhere(job)
                    return
        self._elsewhere.discard(job.name)

    def _note_elsewhere(self, job: Job) -> None:
        if job.name not in self._elsewhere:
            self.screen.say(f"{job.name}: runs already, started by another call; waiting")
        self._elsewhere.add(job.name)

    def _waiting(self) -> list[Job]:
        """The jobs to start; those that failed come last."""
        tries = lambda job: len(self._failures.get(job.name, ()))
        return sorted(
            (
                job
                for job in self._known
                if job.name not in self._done
                and job.name not in self._running
                and tries(job) <= self.retries
            ),
            key=tries,
        )

    def _start_what_can(self) -> None:
        """Starts jobs in the free slots; a job that runs elsewhere takes a slot."""
        for job in self._waiting():
            busy = frozenset(self._running) | self._elsewhere
            if self._stopped_by or len(busy) >= len(self.slots):
                return
            if job.name not in busy and self.ready(job, busy):
                used = {other.slot for other in self._running.values()}
                self._start(job, next(i for i in range(len(self.slots)) if i not in used))

    def _start(self, job: Job, slot: int) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._note_elsewhere(job)
                return
            if self.finished(job):  # by another call, meanwhile
                self._done.append(job.name)
                return
            where = self.slots[slot]
            log.write(f"$ {join(job.command)}\n")
            log.flush()
            process = subprocess.Popen(
                [*where.prefix, *job.command],
                env={**self.environment, **where.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,  # the lock goes with it
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches it once: by `_stop`
            )
        self._running[job.name] = _Running(job, slot, process, time.monotonic())
        if self._stopped_by:  # the signal came while it was being started
            process.send_signal(self._stopped_by)
        again = job.name in self._started
        if not again:
            self._given += self.share_done(job)
        self._started.add(job.name)
        self.screen.say(f"{job.name}: started{' again' if again else ''}")

    def _reap(self) -> bool:
        """Records the processes that ended; returns whether there were any."""
        ended = [other for other in self._running.values() if other.process.poll() is not None]
        for other in ended:
            job, status = other.job, other.process.returncode
            del self._running[job.name]
            took = progress.duration(time.monotonic() - other.began)
            if status == 0:
                self._done.append(job.name)
                result = self.result(job)
                self.screen.say(f"{job.name}: finished after {took}{result and f', {result}'}")
            elif status == PREEMPTED:
                self.screen.say(f"{job.name}: preempted and saved after {took}")
            elif self._stopped_by and status in (-self._stopped_by, 128 + self._stopped_by):
                self.screen.say(f"{job.name}: stopped after {took}")
            else:
                how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"{status}"
                tries = self._failures.setdefault(job.name, [])
                tries.append(how)
                if status == USAGE_ERROR:  # would be the same again
                    tries += [how] * (self.retries + 1 - len(tries))
                self.screen.say(
                    f"{job.name}: FAILED after {took} ({how}): {_cause(job.log)} [{job.log}]"
                )
        return bool(ended)

    def _stop(self, number: int, _) -> None:
        """Passes a signal on to the jobs, and starts no more."""
        self._stopped_by = number
        for other in self._running.values():
            other.process.send_signal(number)

    def _work_done(self) -> float:
        """The number of finished jobs plus the shares of the running ones."""
        return len(self._done) + sum(self.share_done(r.job) for r in self._running.values())

    def _show(self, elapsed: float) -> None:
        total, done = len(self._known), self._work_done()
        eta = ""
        if done - self._given > LEAST_FOR_ETA:
            left = elapsed / (done - self._given) * (total - done)
            eta = f", ETA {progress.duration(left)}"
        at = ", ".join(
            f"{name} ({self.share_done(other.job):.0%})" for name, other in self._running.items()
        )
        self.screen.show(
            f"{len(self._done)} of {total} runs finished{eta}{at and f'; running: {at}'}"
        )


def _cause(log: epath.Path) -> str:
    """The last exception in a log (JAX adds notes below it), else its last line."""
    last_try = re.split(r"^\$ ", log.read_text(), flags=re.MULTILINE)[-1]
    lines = [line.strip() for line in last_try.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+: ", line)]
    return raised[-1] if raised else lines[-1]  # the command at least
