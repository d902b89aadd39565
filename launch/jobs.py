"""Runs commands on this machine, N at a time, resumable; for `grain-jax sweep`.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from shlex import join
from shutil import which
from typing import NamedTuple

from etils import epath

from grain_jax.cli.process import USAGE_ERROR
from grain_jax.core import errors, progress

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
class _State:
    """What is known of a job; the last three are of the try that runs."""

    job: Job
    done: bool = False
    elsewhere: bool = False  # a process of another call is at work on it
    started: bool = False
    failures: list[str] = dataclasses.field(default_factory=list)  # how each try ended
    process: subprocess.Popen | None = None
    slot: int = -1
    began: float = 0.0


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

    jobs: Callable[[], Iterable[Job]]
    finished: Callable[[Job], bool]
    slots: Sequence[Slot]
    screen: progress.Line
    ready: Callable[[Job, frozenset[str]], bool] = lambda job, running: True
    share_done: Callable[[Job], float] = lambda job: 0.0
    result: Callable[[Job], str] = lambda job: ""
    retries: int = 1
    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ)

    def __post_init__(self):
        self._states: dict[str, _State] = {}  # in the order in which they should start
        self._stopped_by: int | None = None
        self._given = 0.0  # jobs' worth of work that calls before this one did

    def run(self) -> Outcome:
        """Runs the jobs. Passes SIGTERM and SIGINT on to them and returns when they have ended."""
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._refresh()
            self._given = len(self._done())
            if self._given:
                self.screen.say(f"{self._given} of {len(self._states)} runs finished before")
            began = shown = looked = time.monotonic()
            while True:
                now = time.monotonic()
                if self._reap() or now - looked > SLOW_POLL:
                    self._refresh()
                    looked = now
                self._start_what_can()
                if not self._running() and (self._stopped_by or not self._waiting()):
                    break
                if now - shown > SLOW_POLL:
                    self._show(now - began)
                    shown = now
                time.sleep(POLL)
            self.screen.close(stays=True)
        finally:  # whatever ended the loop, no job is left without a runner
            for state in self._running():
                state.process.terminate()
            for state in self._running():
                state.process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        failed = {
            name: state.failures[-1]
            for name, state in self._states.items()
            if not state.done and len(state.failures) > self.retries
        }
        return Outcome(self._done(), failed, self._stopped_by)

    def _done(self) -> list[str]:
        return [name for name, state in self._states.items() if state.done]

    def _running(self) -> list[_State]:
        return [state for state in self._states.values() if state.process]

    def _waiting(self) -> list[_State]:
        """The jobs to start; those that failed come last."""
        left = [state for state in self._states.values() if not state.done and not state.process]
        left = [state for state in left if len(state.failures) <= self.retries]
        return sorted(left, key=lambda state: len(state.failures))

    def _refresh(self) -> None:
        """Lists the jobs, and checks those that are new or run elsewhere; one that runs is known at every moment."""
        states: dict[str, _State] = {}
        for job in self.jobs():
            state = states[job.name] = self._states.get(job.name) or _State(job)
            if job.name not in self._states or state.elsewhere:
                state.done = self.finished(job)
                state.elsewhere = state.elsewhere and not state.done
                if not state.done and job.log.exists():
                    with job.log.open() as log:  # two that look do not see each other
                        self._lock(state, log, fcntl.LOCK_SH)
        self._states = states | {s.job.name: s for s in self._running()}

    def _lock(self, state: _State, log, kind: int) -> bool:
        """Whether the log of a job could be locked; else the process of another call holds it."""
        try:
            fcntl.flock(log, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not state.elsewhere:
                name = state.job.name
                self.screen.say(f"{name}: runs already, started by another call; waiting")
            state.elsewhere = True
            return False
        state.elsewhere = False
        return True

    def _start_what_can(self) -> None:
        """Starts jobs in the free slots; a job that runs elsewhere takes a slot."""
        for state in self._waiting():
            states = self._states.items()
            busy = frozenset(name for name, other in states if other.process or other.elsewhere)
            if self._stopped_by or len(busy) >= len(self.slots):
                return
            if not state.elsewhere and self.ready(state.job, busy):
                used = {other.slot for other in self._running()}
                self._start(state, next(i for i in range(len(self.slots)) if i not in used))

    def _start(self, state: _State, slot: int) -> None:
        job = state.job
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a") as log:
            if not self._lock(state, log, fcntl.LOCK_EX):
                return
            if self.finished(job):  # by another call, meanwhile
                state.done = True
                return
            where = self.slots[slot]
            log.write(f"$ {join(job.command)}\n")
            log.flush()
            state.process = subprocess.Popen(
                [*where.prefix, *job.command],
                env={**self.environment, **where.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,  # the lock goes with it
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches it once: by `_stop`
            )
        state.slot, state.began = slot, time.monotonic()
        if self._stopped_by:  # the signal came while it was being started
            state.process.send_signal(self._stopped_by)
        if not state.started:
            self._given += self.share_done(job)
        self.screen.say(f"{job.name}: started{' again' if state.started else ''}")
        state.started = True

    def _reap(self) -> bool:
        """Records the processes that ended; returns whether there were any."""
        ended = [state for state in self._running() if state.process.poll() is not None]
        for state in ended:
            status, state.process = state.process.returncode, None
            took = progress.duration(time.monotonic() - state.began)
            if status == 0:
                state.done = True
                result = self.result(state.job)
                how = f"finished after {took}{result and f', {result}'}"
            elif status == PREEMPTED:
                how = f"preempted and saved after {took}"
            elif self._stopped_by and status in (-self._stopped_by, 128 + self._stopped_by):
                how = f"stopped after {took}"
            else:
                cause = f"killed by {signal.Signals(-status).name}" if status < 0 else f"{status}"
                # Wrong usage would be the same again.
                tries = 1 if status != USAGE_ERROR else self.retries + 1 - len(state.failures)
                state.failures += [cause] * tries
                log = state.job.log
                how = f"FAILED after {took} ({cause}): {_cause(log)} [{log}]"
            self.screen.say(f"{state.job.name}: {how}")
        return bool(ended)

    def _stop(self, number: int, _) -> None:
        """Passes a signal on to the jobs, and starts no more."""
        self._stopped_by = number
        for state in self._running():
            state.process.send_signal(number)

    def _show(self, elapsed: float) -> None:
        shares = {state.job.name: self.share_done(state.job) for state in self._running()}
        total, finished = len(self._states), len(self._done())
        done, eta = finished + sum(shares.values()), ""
        if done - self._given > LEAST_FOR_ETA:
            left = elapsed / (done - self._given) * (total - done)
            eta = f", ETA {progress.duration(left)}"
        at = ", ".join(f"{name} ({share:.0%})" for name, share in shares.items())
        self.screen.show(f"{finished} of {total} runs finished{eta}{at and f'; running: {at}'}")


def _cause(log: epath.Path) -> str:
    """The last exception in a log (JAX adds notes below it), else its last line."""
    last_try = re.split(r"^\$ ", log.read_text(), flags=re.MULTILINE)[-1]
    lines = [line.strip() for line in last_try.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+: ", line)]
    return raised[-1] if raised else lines[-1]  # the command at least
