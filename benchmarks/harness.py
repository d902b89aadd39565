"""What the benchmarks share: flags, the machine, tables, JSON, a recipe to run (`stopwatch`: the timing)."""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from etils import epath


def arguments(doc: str, **flags: Any) -> argparse.Namespace:
    """Reads the flags of a benchmark, and --json, the file for its figures.

    Args:
      doc: docstring of the module, the text of --help.
      **flags: name -> default, whose type the values have: a list takes several, False is a switch, a type
        has no default. A pair (default, keywords) adds keywords of `add_argument`.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    for name, setting in (flags | dict(json=str)).items():
        default, more = setting if isinstance(setting, tuple) else (setting, {})
        if default is False:
            options = dict(action="store_true")
        elif isinstance(default, type):
            options = dict(type=default)
        elif isinstance(default, list):
            options = dict(default=default, type=type(default[0]), nargs="+")
        else:
            options = dict(default=default, type=type(default))
        parser.add_argument(f"--{name.replace('_', '-')}", **(options | more))
    return parser.parse_args()


def device() -> tuple[str, str]:
    """(platform, kind) of JAX's first device, by a process that ends, so that its memory stays free."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=-1, text=True)
    platform, _, kind = done.stdout.splitlines()[-1].partition(" ")
    return platform, kind


def machine(*packages: str, about: str = "") -> dict[str, Any]:
    """The processor, cores, load and versions of `packages`; prints them in one line after `about`."""
    processor, info = platform.processor(), epath.Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE)
        processor = names[0] if names else processor
    environment = dict(
        processor=processor,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        load=round(os.getloadavg()[0], 1),
        platform=platform.platform(),
        python=platform.python_version(),
        versions={name: metadata.version(name) for name in packages},
    )
    versions = "".join(f", {name} {version}" for name, version in environment["versions"].items())
    line = f"{processor}, {environment['cores']} cores, load {environment['load']} at the start;"
    print(f"{about}{'; ' if about else ''}{line} Python {environment['python']}{versions}", flush=True)
    return environment


def spread(values: Sequence[float], digits: int) -> str:
    """Median (least - most) of the values."""
    shown = statistics.median(values), min(values), max(values)
    median, least, most = (f"{x:.{digits}f}" for x in shown)
    return f"{median} ({least} - {most})"


class Table:
    """A table whose rows are printed as they come and kept for JSON, in `rows`.

    Args:
      columns: key of a row -> format of its cells, alignment and width first (">12,.1f"). A string takes
        these two alone; a list is printed as its `spread` with as many digits.
    """

    def __init__(self, columns: Mapping[str, str]):
        self.rows: list[dict[str, Any]] = []
        self._columns = columns
        self._print({key: key.replace("_", " ") for key in columns})

    def add(self, **row: Any) -> None:
        """Prints the cells of the columns, empty where the row has none, and keeps the whole row."""
        self.rows.append(row)
        self._print(row)

    def _print(self, row: Mapping[str, Any]) -> None:
        cells = []
        for key, layout in self._columns.items():
            width, digits = re.fullmatch(r"([<>]?\d+)(?:.*\.(\d))?.*", layout).groups()
            cell = row.get(key, "")
            if isinstance(cell, list):
                cell = spread(cell, int(digits))
            cells.append(format(cell, width if isinstance(cell, str) else layout))
        print(" ".join(cells).rstrip(), flush=True)


def write(path: epath.PathLike | None, content: Any) -> None:
    """Writes results as JSON; does nothing without a path."""
    if path is not None:
        epath.Path(path).write_text(json.dumps(content, indent=2, default=list) + "\n")


TIMINGS = ("images_per_second", "input_wait_fraction", "model_flops_per_second", "mfu")


def lines(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl without timings and memory; [] before the first."""
    path = epath.Path(workdir) / "metrics.jsonl"
    found = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in found if line.endswith("\n")]
    differs = lambda name: name in TIMINGS or name.startswith(("time/", "process/", "memory_"))
    return [{k: v for k, v in line.items() if not differs(k)} for line in whole]


KEYS = {"total_steps": 1000, "optim.warmup_steps": 10, "input.lanes": 1}


def config(size: str, changes: Mapping[str, Any]) -> Any:
    """The recipe of that size as a Config, for 1,000 steps, with `changes` (flattened keys)."""
    from grain_jax import config as config_lib
    from grain_jax.config import recipe

    values = recipe.base(size)
    values.update_from_flattened_dict(KEYS | dict(changes))
    return config_lib.from_dict(values)
