"""Timing of alternatives in one run, in turns: `measure` in a process a side, `in_turns` in this process.

In one process, sides of different frameworks would share its memory allocator and compete for its threads. A
side is a function that returns its variants, {name: callable}; it runs in a fresh process, which waits while the
others run. The return value of a variant (a loss, a count) is reported beside its seconds.
"""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from etils import epath

Side = Callable[..., Mapping[str, Callable[[], Any]]]


class Timing(NamedTuple):
    """The turns of a variant, without the warm-up."""

    seconds: list[float]
    value: Any  # return value of the last turn

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def _serve(pipe, side: Side, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    try:
        variants = side(**arguments)
        pipe.send(list(variants))
        while (name := pipe.recv()) is not None:
            began = time.perf_counter()
            value = variants[name]()
            pipe.send((time.perf_counter() - began, value))
    except BaseException as error:
        pipe.send(error)
        raise


def measure(
    sides: Mapping[str, tuple[Side, Mapping[str, Any]]],
    *,
    turns: int,
    warm_up: int = 1,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Timing]:
    """Runs every variant of every side `turns` times, in turns, each side in a process of its own.

    Args:
      sides: name -> (function, its keyword arguments); both must be picklable. The function does its own
        imports.
      turns: timed runs of a variant.
      warm_up: runs before them, not timed.
      environment: variables for the processes of the sides.

    Returns: "SIDE VARIANT" -> `Timing`.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes, order = {}, [], []

    def receive(name: str):
        got = pipes[name].recv()
        if isinstance(got, BaseException):
            raise RuntimeError(f"{name}: {type(got).__name__}: {got}") from got
        return got

    try:
        for name, (side, arguments) in sides.items():
            pipes[name], other = context.Pipe()
            process = context.Process(
                target=_serve, args=(other, side, arguments, environment or {})
            )
            process.start()
            processes.append(process)
            order += [(name, variant) for variant in receive(name)]  # one starts at a time
        out = {f"{name} {variant}": Timing([], None) for name, variant in order}
        for turn in range(warm_up + turns):
            for name, variant in order:
                pipes[name].send(variant)
                seconds, value = receive(name)
                timing = out[f"{name} {variant}"]._replace(value=value)
                if turn >= warm_up:
                    timing.seconds.append(seconds)
                out[f"{name} {variant}"] = timing
    finally:
        for pipe in pipes.values():
            try:
                pipe.send(None)
            except OSError:  # its process has ended
                pass
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return out


def in_turns(
    functions: Mapping[str, Callable[[], Any]], *, turns: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Runs every function `warm_up` + `turns` times, in turns, in this process; name -> `Timing`."""
    out = {name: Timing([], None) for name in functions}
    for turn in range(warm_up + turns):
        for name, function in functions.items():
            began = time.perf_counter()
            value = function()
            seconds = time.perf_counter() - began
            out[name] = out[name]._replace(value=value)
            if turn >= warm_up:
                out[name].seconds.append(seconds)
    return out


def machine(*packages: str) -> dict[str, Any]:
    """The machine of a measurement: processor, cores, load, and the versions of `packages`."""
    processor = platform.processor()
    info = epath.Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return dict(
        processor=processor,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        load=round(os.getloadavg()[0], 1),
        platform=platform.platform(),
        python=platform.python_version(),
        versions={name: metadata.version(name) for name in packages},
    )


def on(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load']} at the start;"
        f" Python {machine['python']}, {versions}"
    )


def write(path: epath.PathLike | None, content: Any) -> None:
    """Writes results as JSON; does nothing without a path."""
    if path is not None:
        epath.Path(path).write_text(json.dumps(content, indent=2, default=list) + "\n")


def spread(seconds: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Median (least - most) of values times `scale`."""
    median, least, most = (
        f"{scale * x:.{digits}f}" for x in (statistics.median(seconds), min(seconds), max(seconds))
    )
    return f"{median} ({least} - {most})"
