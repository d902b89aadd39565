"""What the benchmarks share: flags, sides timed in turns, agreement of their values, the machine, tables, JSON."""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from etils import epath

Side = Callable[..., Mapping[str, Callable[[], Any]]]


def arguments(doc: str, **flags: Any) -> argparse.Namespace:
    """Reads the flags of a benchmark, and --json, the file for its figures.

    Args:
      doc: docstring of the module, the text of --help.
      **flags: name -> default, whose type the values have: a list takes several, False is a switch, a type has no
        default. A pair (default, keywords) adds keywords of `add_argument`. `command` is positional.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (flags | dict(json=str)).items():
        default, more = default if isinstance(default, tuple) else (default, {})
        several, typed = isinstance(default, list), isinstance(default, type)
        options: dict[str, Any] = dict(default=None if typed else default)
        if default is False:
            options["action"] = "store_true"
        else:
            options["type"] = default if typed else type(default[0] if several else default)
        if several:
            options["nargs"] = "+"
        flag = name if name == "command" else f"--{name.replace('_', '-')}"
        parser.add_argument(flag, **(options | more))
    return parser.parse_args()


class Timing(NamedTuple):
    """The turns of a variant, without the warm-up."""

    seconds: list[float]
    value: Any  # return value of the last turn

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    value = function()
    return time.perf_counter() - began, value


def _rounds(
    functions: Mapping[str, Callable[[], tuple[float, Any]]], turns: int, warm_up: int
) -> dict[str, Timing]:
    out = {name: Timing([], None) for name in functions}
    for turn in range(warm_up + turns):
        for name, function in functions.items():
            seconds, value = function()
            out[name] = Timing(out[name].seconds + [seconds] * (turn >= warm_up), value)
    return out


def in_turns(
    functions: Mapping[str, Callable[[], Any]], *, turns: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Runs every function `warm_up` + `turns` times, in turns, in this process; name -> `Timing`."""
    timed = {name: functools.partial(_timed, f) for name, f in functions.items()}
    return _rounds(timed, turns, warm_up)


_variants: dict[str, Callable[[], Any]] = {}  # of the side that this process runs


def _start(side: Side, given: Mapping[str, Any]) -> list[str]:
    _variants.update(side(**given))
    return list(_variants)


def _turn(name: str) -> tuple[float, Any]:
    return _timed(_variants[name])


def measure(
    sides: Mapping[str, tuple[Side, Mapping[str, Any]]], *, turns: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Runs every variant of every side in turns, each side in a process of its own, which waits while others run.

    In one process, sides of different frameworks would share its memory allocator and compete for its threads.

    Args:
      sides: name -> (function, its keyword arguments); both must be picklable. The function does its own
        imports and returns its variants, {name: callable}.
      turns: timed runs of a variant.
      warm_up: runs before them, not timed.

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
        return _rounds(functions, turns, warm_up)


def device() -> tuple[str, str]:
    """(platform, kind) of JAX's first device, by a process that ends, so that its memory stays free."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=-1, text=True)
    platform, _, kind = done.stdout.splitlines()[-1].partition(" ")
    return platform, kind


def agree(values: Mapping[str, Any], tolerance: float, what: str) -> float:
    """The worst max|a-b| / max|b| of arrays to the first, b; ends the program with status 1 above the tolerance."""
    reference, *others = (np.asarray(value, np.float64) for value in values.values())
    errors = [np.abs(other - reference).max() / np.abs(reference).max() for other in others]
    worst = float(max(errors, default=0.0))
    if not worst <= tolerance:
        sys.exit(
            f"{what} differ by {worst:.1e}: " + ", ".join(f"{n} {v}" for n, v in values.items())
        )
    return worst


def machine(*packages: str, about: str = "") -> dict[str, Any]:
    """The processor, cores, load and versions of `packages`; prints them in one line after `about`."""
    processor, info = platform.processor(), epath.Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE)
        processor = names[0] if names else processor
    found = dict(
        processor=processor,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        load=round(os.getloadavg()[0], 1),
        platform=platform.platform(),
        python=platform.python_version(),
        versions={name: metadata.version(name) for name in packages},
    )
    versions = "".join(f", {name} {version}" for name, version in found["versions"].items())
    line = f"{processor}, {found['cores']} cores, load {found['load']} at the start;"
    print(f"{about}{'; ' if about else ''}{line} Python {found['python']}{versions}", flush=True)
    return found


def spread(seconds: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Median (least - most) of values times `scale`."""
    median, least, most = (
        f"{scale * x:.{digits}f}" for x in (statistics.median(seconds), min(seconds), max(seconds))
    )
    return f"{median} ({least} - {most})"


class Table:
    """A table whose rows are printed as they come and kept for JSON, in `rows`.

    Args:
      columns: key of a row -> format of its cells, alignment and width first (">12,.1f"). A string takes these two
        alone; a list is printed as its `spread` with as many digits, or without digits as the texts that it holds.
      scale: factor of the values of a list.
    """

    def __init__(self, columns: Mapping[str, str], scale: float = 1.0):
        self.rows: list[dict[str, Any]] = []
        self._columns, self._scale = columns, scale
        self._print({key: key.replace("_", " ") for key in columns})

    def add(self, **row: Any) -> None:
        """Prints the cells of the columns, empty where the row has none, and keeps the whole row."""
        self.rows.append(row)
        self._print(row)

    def _print(self, row: Mapping[str, Any]) -> None:
        cells = []
        for key, given in self._columns.items():
            width, digits = re.fullmatch(r"([<>]?\d+)(?:.*\.(\d))?.*", given).groups()
            cell = row.get(key, "")
            if isinstance(cell, list):
                cell = spread(cell, self._scale, int(digits)) if digits else ", ".join(cell)
            cells.append(format(cell, width if isinstance(cell, str) else given))
        print(" ".join(cells).rstrip(), flush=True)


def write(path: epath.PathLike | None, content: Any) -> None:
    """Writes results as JSON; does nothing without a path."""
    if path is not None:
        epath.Path(path).write_text(json.dumps(content, indent=2, default=list) + "\n")


KEYS = {"total_steps": 1000, "optim.warmup_steps": 10, "input.lanes": 1}
CONFIG_FILE = """
from grain_jax.config.recipe import base


def get_config():
    c = base({!r})
    c.update_from_flattened_dict({!r})
    return c
"""


def config(size: str, changes: Mapping[str, Any]) -> Any:
    """The recipe of that size as a Config, for 1,000 steps, with `changes` (flattened keys)."""
    from grain_jax import config as config_lib
    from grain_jax.config import recipe

    values = recipe.base(size)
    values.update_from_flattened_dict(KEYS | dict(changes))
    return config_lib.from_dict(values)


def config_file(folder: epath.Path, size: str, changes: Mapping[str, Any]) -> epath.Path:
    """Such a recipe as a config file in the folder."""
    file = folder / "my_config.py"
    file.write_text(CONFIG_FILE.format(size, KEYS | dict(changes)))
    return file
