"""The operations of a train step that take longest on this device, by a profile.

python -m benchmarks.profile [--size B/16] [--batch 8] [--attention auto] [--top 10] [--json OUT.json]
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from benchmarks import harness
from benchmarks.train_step import TrainStep, make_config
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


def main() -> None:
    """Prints the longest operations."""
    args = harness.arguments(__doc__, size="B/16", batch=8, attention="auto", top=10)
    config = make_config(args.size, args.batch, **{"model.attention": args.attention})
    step = TrainStep(config)
    step.loss()
    with tempfile.TemporaryDirectory() as folder:
        file = trace(lambda: (step(), step.held[0].step), folder)
        found = operations(file, step.compiled.as_text())[: args.top]
    table = harness.Table(dict(name="34", ms=">9.3f", share=">7.1%", where="<1"))
    for row in found:
        table.add(**row)
    harness.write(args.json, dict(device=jax.devices()[0].device_kind, rows=table.rows))


if __name__ == "__main__":
    main()
