"""Times sides of a comparison turn by turn, and checks that their values agree."""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np

Side = Callable[..., Mapping[str, Callable[[], Any]]]


class Timing(NamedTuple):
    """The turns of a variant, without the warm-up."""

    seconds: list[float]
    value: Any  # return value of the last turn


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    value = function()
    return time.perf_counter() - began, value


def _rounds(functions: Mapping[str, Callable[[], tuple[float, Any]]], turns: int):
    out = {name: Timing([], None) for name in functions}
    for turn in range(1 + turns):  # the first is not timed
        for name, function in functions.items():
            seconds, value = function()
            out[name] = Timing(out[name].seconds + [seconds] * (turn > 0), value)
    return out


_variants: dict[str, Callable[[], Any]] = {}  # of the side that this process runs


def _start(side: Side, options: Mapping[str, Any]) -> list[str]:
    _variants.update(side(**options))
    return list(_variants)


def _turn(name: str) -> tuple[float, Any]:
    return _timed(_variants[name])


def measure(sides: Mapping[str, tuple[Side, Mapping[str, Any]]], turns: int) -> dict[str, Timing]:
    """Runs every variant of every side in turns, each side in its own process, which waits while others run.

    In one process, sides of different frameworks would share its allocator and compete for its threads.

    Args:
      sides: name -> (function, its keyword arguments); both must be picklable. The function does its own
        imports and returns its variants, {name: callable}.
      turns: timed runs of a variant, after one that is not timed.

    Returns: "SIDE VARIANT" -> `Timing`, with what the variant returned (a loss, a count).
    """
    spawn, functions = multiprocessing.get_context("spawn"), {}
    with contextlib.ExitStack() as stack:
        for name, side in sides.items():
            pool = ProcessPoolExecutor(1, spawn)
            stack.enter_context(pool)
            stack.callback(pool.submit, os._exit, 0)  # without waiting for threads of a framework
            for variant in pool.submit(_start, *side).result():  # one starts at a time
                run = lambda pool=pool, variant=variant: pool.submit(_turn, variant).result()
                functions[f"{name} {variant}"] = run
        return _rounds(functions, turns)


def agree(values: Mapping[str, Any], tolerance: float, label: str) -> float:
    """The worst max|a-b| / max|b| of arrays to the first, b; above the tolerance ends with status 1."""
    reference, *others = (np.asarray(value, np.float64) for value in values.values())
    errors = [np.abs(other - reference).max() / np.abs(reference).max() for other in others]
    worst = float(max(errors, default=0.0))
    if not worst <= tolerance:
        sys.exit(f"{label} differ by {worst:.1e}: " + ", ".join(f"{n} {v}" for n, v in values.items()))
    return worst
