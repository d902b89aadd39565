"""Where the wall time of a run went, restarts included; and which process is slow.

Every line of metrics.jsonl has the shares, as `time/KIND`. They add up to 1. A process that resumes reads
them from the lines before, and goes on counting. The time of several processes is that of the first.

The shares are those of goodput, as MaxText and ml-goodput-measurement report it: `steps` is the time that
trained the model which is kept.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from grain_jax.core import metrics_file

# What a run spends its time on -> the words of the last line.
KINDS = {
    "steps": "steps",
    "input": "waiting for input",
    "compile": "compiling",
    "restore": "restoring",
    "save": "saving",
    "evaluate": "evaluating",
    "repeated": "steps lost by a restart",  # those after the checkpoint that a restart took
    "stopped": "stopped",  # from the last line of a process to the start of the next one
    "other": "other",
}
SECONDS, UNIX, REPEATED = "time/seconds", "time/unix", "time/repeated_steps"
SLOW = 2.0  # times the step time of the fastest process, from which on the slowest is named
SLOW_SECONDS = 0.5  # and by at least so many seconds a step


class Clock:
    """Counts the seconds of each of KINDS; begins with `other`."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "other", time.monotonic()
        self._began = time.time()
        self._repeated_steps = 0
        self.waited = 0.0  # seconds for devices, in all

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """What happens inside is of that kind, but for what an inner block spends."""
        outer = self._kind
        self._change(kind)
        try:
            yield
        finally:
            self._change(outer)

    def _change(self, kind: str) -> None:
        now = time.monotonic()
        self._seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the process waits for its devices, and so for all others."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - began

    def resume_from(self, lines: Sequence[metrics_file.Line], step: int) -> None:
        """Adds what the run spent before.

        Args:
          lines: of metrics.jsonl, as the process before left them.
          step: that this process resumes from. The time of later steps was lost.
        """
        counted = [x.values for x in lines if SECONDS in x.values]
        if not counted:
            return
        last = max(counted, key=lambda x: x[UNIX])
        kept = max((x for x in counted if x["step"] <= step), key=lambda x: x[UNIX], default=None)
        before = {kind: last[f"time/{kind}"] * last[SECONDS] for kind in KINDS}
        for kind in ("steps", "input"):
            useful = kept[f"time/{kind}"] * kept[SECONDS] if kept else 0.0
            before["repeated"] += max(before[kind] - useful, 0.0)
            before[kind] = min(before[kind], useful)
        before["stopped"] += max(self._began - last[UNIX], 0.0)
        for kind, seconds in before.items():
            self._seconds[kind] += seconds
        self._repeated_steps = int(last[REPEATED]) + max(last["step"] - step, 0)

    def numbers(self) -> dict[str, float]:
        """The shares, the seconds since the run began, the time of day and the steps that were done twice."""
        self._change(self._kind)
        total = max(sum(self._seconds.values()), 1e-9)
        shares = {f"time/{kind}": seconds / total for kind, seconds in self._seconds.items()}
        return {**shares, SECONDS: total, UNIX: time.time(), REPEATED: self._repeated_steps}

    def words(self) -> str:
        """The shares in a line, the largest first."""
        numbers = self.numbers()
        shares = {label: numbers[f"time/{kind}"] for kind, label in KINDS.items()}
        parts = [f"{label} {x:.1%}" for label, x in sorted(shares.items(), key=lambda x: -x[1])]
        return ", ".join(part for part in parts if not part.endswith(" 0.0%"))


class Own(NamedTuple):
    """What a process knows of itself, since its line before."""

    step_seconds: float  # per step, without the wait for devices
    memory: float  # bytes in use on its fullest device; NaN if the device does not say
    peak: float


def of_processes(own: Own) -> dict[str, float]:
    """The largest memory of a device and, of several processes, the slowest and the fastest; a collective.

    A step ends on all processes at once, so each counts its own time: all but the wait for devices, which is
    a wait for the slowest. Seconds in which a process stood still count as its own.
    """
    alone = jax.process_count() == 1
    rows = np.array([own]) if alone else multihost_utils.process_allgather(np.array(own, np.float32))
    seconds, memory, peak = np.asarray(rows, np.float64).reshape(-1, len(Own._fields)).T
    numbers = {}
    if not np.isnan(memory).all():
        numbers = {"memory_bytes": np.nanmax(memory), "memory_peak_bytes": np.nanmax(peak)}
    if not alone:
        numbers |= {
            "process/slowest": seconds.argmax(),
            "process/slowest_step_seconds": seconds.max(),
            "process/fastest_step_seconds": seconds.min(),
        }
    return {name: float(value) for name, value in numbers.items()}


def warning(numbers: Mapping[str, float]) -> str | None:
    """A line that names the slowest process, if it is much slower than the fastest one."""
    slow, fast = (numbers.get(f"process/{x}_step_seconds", 0.0) for x in ("slowest", "fastest"))
    if slow < SLOW * fast or slow - fast < SLOW_SECONDS:
        return None
    return (
        f"process {numbers['process/slowest']:.0f} is slow: {slow:.2f} s per step beside the wait for"
        f" devices, the fastest process {fast:.2f} s"
    )


def memory_of_devices() -> tuple[float, float]:
    """(bytes in use, peak) of the fullest device of this process; NaN if the devices do not say."""
    stats = [x for x in (device.memory_stats() for device in jax.local_devices()) if x]
    if not stats:
        return float("nan"), float("nan")
    return max(x["bytes_in_use"] for x in stats), max(x["peak_bytes_in_use"] for x in stats)
