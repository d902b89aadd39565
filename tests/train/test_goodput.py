"""Where the time of a run went: shares over restarts, by hand; and which process is named as slow."""

import json

import numpy as np
import pytest

from grain_jax.core import metrics_file
from grain_jax.train import goodput


@pytest.fixture
def now(monkeypatch):
    """What the clocks say: now[0] seconds, and as many after 1000 in the time of day."""
    now = [0.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(goodput.time, "time", lambda: 1000 + now[0])
    return now


def _line(step, clock):
    values = {"step": step, **clock.numbers()}
    return metrics_file.Line(step, values, json.dumps(values))


def _seconds(clock):
    numbers = clock.numbers()
    total = numbers[goodput.SECONDS]
    return {k: round(numbers[f"time/{k}"] * total, 6) for k in goodput.KINDS if numbers[f"time/{k}"]}


def test_two_kills_are_counted_by_hand(now):
    clock = goodput.Clock()
    now[0] = 2.0  # other
    with clock.spend("compile"):
        now[0] = 12.0
    lines = []
    with clock.spend("steps"):
        for step in (1, 2, 3):
            with clock.spend("input"):
                now[0] += 1.0
            now[0] += 9.0
            lines.append(_line(step, clock))
    assert _seconds(clock) == dict(other=2, compile=10, steps=27, input=3)
    now[0] = 50.0  # killed at 42, after step 3; the checkpoint has step 1
    clock = goodput.Clock()
    clock.resume_from(lines, 1)
    assert _seconds(clock) == dict(other=2, compile=10, steps=9, input=1, repeated=20, stopped=8)
    with clock.spend("steps"):
        now[0] += 10.0
        again = _line(2, clock)
    assert clock.numbers()[goodput.REPEATED] == 2
    lines = [lines[0], again]
    now[0] = 61.0
    clock = goodput.Clock()  # killed again; nothing was saved
    clock.resume_from(lines, 0)
    expected = dict(other=2, compile=10, repeated=40, stopped=9)
    assert _seconds(clock) == expected and clock.numbers()[goodput.REPEATED] == 4
    assert sum(clock.numbers()[f"time/{kind}"] for kind in goodput.KINDS) == pytest.approx(1)
    assert clock.words() == "steps lost by a restart 65.6%, compiling 16.4%, stopped 14.8%, other 3.3%"


def test_a_clock_that_goes_on_without_lines_is_new(now):
    clock = goodput.Clock()
    clock.resume_from([metrics_file.Line(3, {"step": 3, "loss": 1.0}, "")], 3)
    now[0] = 5.0
    assert _seconds(clock) == dict(other=5)


def test_the_slowest_process_is_named(monkeypatch):
    rows = np.array([[0.1, np.nan, np.nan], [1.6, 5e9, 6e9]])
    monkeypatch.setattr(goodput.jax, "process_count", lambda: 2)
    monkeypatch.setattr(goodput.multihost_utils, "process_allgather", lambda own: rows)
    numbers = goodput.of_processes(goodput.Own(0.1, np.nan, np.nan))
    assert numbers == {
        "memory_bytes": 5e9,
        "memory_peak_bytes": 6e9,
        "process/slowest": 1,
        "process/slowest_step_seconds": 1.6,
        "process/fastest_step_seconds": 0.1,
    }
    said = goodput.warning(numbers)
    assert said == (
        "process 1 is slow: 1.60 s per step beside the wait for devices, the fastest process 0.10 s"
    )
    assert goodput.warning(numbers | {"process/slowest_step_seconds": 0.5}) is None
    assert goodput.warning({}) is None
