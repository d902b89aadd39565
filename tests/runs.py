"""Runs of the trainer in tests: their lines, the command that starts one, and configs that are forged."""

import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import harness
from tests import compiling

lines, TIMINGS = harness.lines, harness.TIMINGS
# Settings of tests/run_config.py: as little to compile as there can be.
SMALL = {"model.text.vocab_size": 600} | {f"model.{x}.depth": 1 for x in ("image", "text", "decoder")}


def command(
    workdir: pathlib.Path, changes: Mapping[str, Any], *, processes: int = 0, devices: int = 1
) -> list[str]:
    """`grain-jax train` of tests/run_config.py; with `processes`, by `grain-jax local`."""
    out = [sys.executable, "-m", "grain_jax.train", "--config", "tests/run_config.py"]
    out += ["--workdir", str(workdir), *(f"--config.{k}={v}" for k, v in changes.items())]
    if processes:
        head = [sys.executable, "-m", "grain_jax.launch.local", f"--processes={processes}"]
        return [*head, f"--devices-per-process={devices}", "--", *out]
    return out


def on_one_device(compiled: pathlib.Path) -> dict[str, str]:
    """The environment of a command with one CPU device, whose programs are kept in that folder."""
    cache = dict(JAX_COMPILATION_CACHE_DIR=str(compiled), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.FLAGS, **cache}


def forge_config(workdir: pathlib.Path, config: Any) -> None:
    """Puts `config` into the workdir and its checkpoints, with digests to match."""
    from grain_jax import config as config_lib
    from grain_jax.checkpoint import digests

    text = config_lib.to_json(config)
    (workdir / "config.json").write_text(text)
    for folder in (workdir / "checkpoints").iterdir():
        path = folder / "_CHECKPOINT_METADATA"
        content = json.loads(path.read_text())
        items = content["custom_metadata"]
        items["config"] = json.loads(text)
        items["digests"]["items"] = digests.of_json([items[x] for x in ("config", "data", "best")])
        path.write_text(json.dumps(content))
