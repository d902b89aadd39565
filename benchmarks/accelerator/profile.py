"""The operations of a profiled step."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from grain_jax.runtime import profiling

TRACED = 3  # steps in the profile


def trace(step: Callable[[], Any], folder: str) -> epath.Path:
    """The profile of TRACED steps in `folder`."""
    trace = profiling.StepTrace(folder, start=1, steps=TRACED)
    for number in range(1, TRACED + 1):
        trace.begin(number)
        trace.end(number, step())
    return next(epath.Path(folder).glob("tensorboard/plugins/profile/*/*.xplane.pb"))


def operations(file: epath.Path, hlo: str) -> list[dict[str, Any]]:
    """The operations of a profile by their own time, the longest first.

    Args:
      file: an xplane.pb of TRACED steps.
      hlo: the compiled program, which says what part of the model an operation is of.

    Returns:
      name, ms of a step, share of the time of all, and where in the model.
    """
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    on_device = [p for p in planes if p.name.startswith(("/device:TPU", "/device:GPU"))]
    own: dict[str, float] = {}
    for plane in on_device or [p for p in planes if p.name.startswith("/host:CPU")]:
        lines = list(plane.lines)
        of_operations = [line for line in lines if line.name == "XLA Ops"]  # TPU
        if on_device and not of_operations:
            of_operations = [line for line in lines if line.name.startswith("Stream")]  # GPU
        for line in of_operations or lines:
            events = [
                (e.start_ns, e.duration_ns, name) for e in line.events if (name := _named(e, line))
            ]
            for name, nanoseconds in own_times(events).items():
                own[name] = own.get(name, 0.0) + nanoseconds
    where = dict(re.findall(r'%?([\w.-]+) = [^\n]*?op_name="([^"]*)"', hlo))
    total = sum(own.values()) or 1.0
    return [
        dict(name=name, ms=ns / 1e6 / TRACED, share=ns / total, where=where.get(name, ""))
        for name, ns in sorted(own.items(), key=lambda item: -item[1])
    ]


def _named(event, line) -> str | None:
    """The operation of an event; None where it is of none, as Python's own are."""
    operation = dict(event.stats).get("hlo_op")
    if operation:
        return str(operation).lstrip("%")
    if line.name == "XLA Ops":  # the name is the instruction
        return event.name.partition(" = ")[0].lstrip("%")
    return event.name if line.name.startswith("Stream") else None


def own_times(events: Sequence[tuple[float, float, str]]) -> dict[str, float]:
    """Name -> time, of (start, duration, name) on one line; what runs inside another counts once, for the inner."""
    own: dict[str, float] = {}
    under: list[tuple[float, str]] = []  # (end, name) of those that run
    for start, duration, name in sorted(events, key=lambda e: (e[0], -e[1])):
        while under and under[-1][0] <= start:
            under.pop()
        if under:
            own[under[-1][1]] -= duration
        own[name] = own.get(name, 0.0) + duration
        under.append((start + duration, name))
    return own
