"""Runs of the trainer in tests: their lines, the command that starts one, and records that are forged to match."""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tests import compiling

TIMINGS = (
    "images_per_second",
    "input_wait_fraction",
    "input_wait_steps",
    "model_flops_per_second",
    "mfu",
)
# Of tests/run_config.py: as little to compile as there can be.
SMALL = {
    "model.text.vocab_size": 600,
    **{f"model.{tower}.depth": 1 for tower in ("image", "text", "decoder")},
}


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without timings."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in found]


def command(
    workdir: pathlib.Path,
    changes: Mapping[str, Any],
    *,
    processes: int = 0,
    devices: int = 1,
    local: tuple[str, ...] = (),
) -> list[str]:
    """`grain-jax train` of tests/run_config.py; with `processes`, by `grain-jax local`."""
    out = [sys.executable, "-m", "grain_jax.train", "--config", "tests/run_config.py"]
    out += ["--workdir", str(workdir), *(f"--config.{k}={v}" for k, v in changes.items())]
    if processes:
        head = [sys.executable, "-m", "grain_jax.launch.local", f"--processes={processes}"]
        return [*head, f"--devices-per-process={devices}", *local, "--", *out]
    return out


def on_one_device(compiled: pathlib.Path) -> dict[str, str]:
    """The environment of a command with one CPU device, whose programs are kept in that folder."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiling.FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def forge(workdir: pathlib.Path, *edits: Callable[[dict[str, Any]], Any]) -> None:
    """Applies each edit to each record and makes the chain anew, as somebody who knows how would."""
    from grain_jax.runtime import receipt  # JAX: the drill's command does without

    previous, written = None, []
    for record in map(json.loads, receipt.read(workdir)):
        for edit in edits:
            edit(record)
        record["previous"] = previous and receipt.sha256(previous)
        written.append(json.dumps(record))
        own = workdir / "checkpoints" / str(record["step"]) / "receipt" / "metadata"
        if own.exists():
            own.write_text(written[-1])
        previous = record
    (workdir / receipt.FILE).write_text("".join(f"{line}\n" for line in written))


def forge_config(workdir: pathlib.Path, config: Any) -> None:
    """Puts `config` into the workdir and its checkpoints, with records to match."""
    from grain_jax import config as config_lib
    from grain_jax.runtime import receipt

    folders = (workdir / "checkpoints").iterdir()
    for path in (workdir / "config.json", *(f / "config" / "metadata" for f in folders)):
        path.write_text(config_lib.to_json(config))
    forge(workdir, lambda record: record.update(config=receipt.config_sha256(config)))
