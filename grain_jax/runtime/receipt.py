"""The receipt of a run: `WORKDIR/receipts.jsonl`, a record for each save, chained by hashes.

A record holds digests of the batches so far, of the saved state and of the logged metrics, and the place of the
run. Each checkpoint has its own record too. `grain-jax verify WORKDIR` checks all of it.
"""

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import jax
import jaxlib
import numpy as np
from etils import epath
from jax.sharding import Mesh

from grain_jax import __version__
from grain_jax import config as config_lib
from grain_jax.core import atomic, regular_file
from grain_jax.runtime import digests

FILE = "receipts.jsonl"


class Record(TypedDict):
    """The form of a record."""

    step: int
    batch_chain: str  # digests of all batches so far
    pixel_chain: str
    state: dict[str, str]  # part of the state -> digest
    metrics: str  # sha256 of the lines of metrics.jsonl since the record before
    config: str  # sha256
    mesh: dict[str, int]  # axis -> size
    processes: int
    environment: dict[str, str]  # versions, device, XLA's flags
    data: str  # sha256 of the item `data` of the checkpoint
    previous: str | None  # sha256 of the record before; None in a run's first


def sha256(value: Any) -> str:
    """The hash of a JSON value (a config or a record), independent of spaces and the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def config_sha256(config: config_lib.Config) -> str:
    """The hash of a config as a checkpoint stores it."""
    return sha256(dataclasses.asdict(config))


def metrics_sha256(lines: Iterable[str], after: int, until: int) -> str:
    """The hash of the lines of `metrics.jsonl` of the steps after `after`, up to and including `until`."""
    digest = hashlib.sha256()
    for line in lines:
        if after < json.loads(line)["step"] <= until:
            digest.update(line.strip().encode() + b"\n")
    return digest.hexdigest()


def environment(config: config_lib.Config) -> dict[str, str]:
    """Versions, device and XLA flags: with the mesh, what the rounding of a run depends on."""
    modules = [jax, jaxlib, np]
    if config.input.source == "records":
        import tensorflow  # loaded by the reader of the records already

        modules.append(tensorflow)
    device = jax.devices()[0]
    flags = sorted(
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if not flag.startswith("--xla_force_host_platform_device_count")
    )
    return {
        "grain_jax": __version__,
        **{module.__name__: module.__version__ for module in modules},
        "platform": device.platform,
        "device": _cpu() if device.platform == "cpu" else device.device_kind,
        "xla_flags": " ".join(flags),
    }


def contradictions(record: Mapping[str, Any], state: Any) -> list[str]:
    """The keys of a record that disagree with `state` (a TrainState). Every process must call it."""
    found = {"step": int(state.step), **digests.chains(state.receipt)}
    found["state"] = digests.of_state(state)
    return [key for key, value in found.items() if record.get(key) != value]


def axes(mesh: Mesh) -> dict[str, int]:
    """Mesh axis -> size, as a record stores them."""
    return {axis: int(size) for axis, size in mesh.shape.items()}


def _cpu() -> str:
    """The model of the processor, for whose instruction set XLA compiles."""
    info = epath.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def record_of(line: str, where: str) -> dict[str, Any]:
    """The record in a line of a receipt, of the form of `Record`. Raises regular_file.FileError."""
    where, expected = f"{where}: got {line[:60]!r}", "a record of a run"
    record = regular_file.from_json(line, dict[str, Any], where, expected)
    regular_file.checked(record, Record, where, expected)
    return record


def read(workdir: epath.PathLike) -> list[str]:
    """The lines of the receipts of a workdir; [] where there are none. Raises regular_file.FileError."""
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return []
    return regular_file.read_text(path, "the receipts of a run", 1 << 30).splitlines()


class Receipts:
    """Keeps the records of a run. Every process has one; the first process writes the file.

    Args:
      workdir, mesh, config: of the run.
      restored: the record in the checkpoint that the run resumes at; None at a fresh start. Later records, of steps
        that are trained again, are removed.
      data: the identities of the record sets (input_pipeline/records.py).
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        mesh: Mesh,
        config: config_lib.Config,
        restored: Mapping[str, Any] | None,
        data: Sequence[Mapping[str, Any]] = (),
    ):
        self._path = epath.Path(workdir) / FILE
        self._same = {
            "config": config_sha256(config),
            "mesh": axes(mesh),
            "processes": jax.process_count(),
            "environment": environment(config),
            "data": sha256(list(data)),
        }
        self._last = restored
        self._lines: list[str] = []
        if jax.process_index() == 0:
            if restored:
                # The line of `restored` is written again: the workdir may have a copy of the checkpoint alone.
                before = [line for line in read(workdir) if _step(line) < restored["step"]]
                self._lines = [*before, json.dumps(restored)]
            self._write()

    def add(self, state: Any, metrics_lines: Iterable[str]) -> dict[str, Any]:
        """Adds the record of a save; call it just before the save.

        Args:
          state: the TrainState to save. All processes call, each with its shards.
          metrics_lines: of `metrics.jsonl`, this step's included; read on the first process only.

        Returns:
          The record, for the checkpoint.
        """
        step = int(state.step)
        record = {
            "step": step,
            **digests.chains(state.receipt),
            "state": digests.of_state(state),
            "metrics": metrics_sha256(metrics_lines, self._last["step"] if self._last else 0, step),
            **self._same,
            "previous": sha256(self._last) if self._last else None,
        }
        self._last = record
        if jax.process_index() == 0:
            self._lines.append(json.dumps(record))
            self._write()
        return record

    def _write(self) -> None:
        """Writes the whole file: object stores cannot append."""
        atomic.write_text(self._path, "".join(line + "\n" for line in self._lines))


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return -1  # not a record: verify reports it
