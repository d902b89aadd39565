"""Start-up time of training: imports, compilation, first step; with and without the compilation cache.

    python -m benchmarks.start_up [--turns 5] [--configs tiny demo] [--json OUT.json]

Every figure comes from a fresh process. `tiny` is the size tiny on the synthetic source, `demo` configs/demo.py on a
small aviary, which is drawn first. The lines of the trainer on stderr divide a run into parts: state, compilation,
first step; then the run is killed. The compilation cache is off, empty, or filled by an earlier run.
"""

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from etils import epath

from benchmarks import harness

REPOSITORY = epath.Path(__file__).absolute().parent.parent
MODULES = ("grain_jax", "jax", "grain_jax.train", "grain_jax.input_pipeline.records")
CACHES = ("none", "empty", "filled")
# Part of a run -> text in the line of the trainer that ends it.
PARTS = {
    "imports, data, state": "device(s), mesh",
    "compiling": "compiled in",
    "first step": "step 1/",
}
AVIARY = "--output runs/aviary --records runs/aviary/records --name aviary --images 1024"
TINY = {"total_steps": 1400, "batch_size": 64, "dtype": "float32", "optim.warmup_steps": 100}
TINY |= {"input.source": "synthetic", "input.lanes": 4, "text.pack_group": 16}
TINY |= {"text.pack_rows": 10}


def environment(**variables: str) -> dict[str, str]:
    """The environment of a child process: this one's, the repository's modules, and the compilation cache as given."""
    own = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return own | {"PYTHONPATH": str(REPOSITORY)} | variables


def import_seconds(module: str) -> float:
    """Seconds of `import module` in a fresh process, without the start of the interpreter."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True)
    return float(out.stdout.split()[-1])


def prepare(folder: epath.Path, configs: list[str]) -> dict[str, epath.Path]:
    """Name -> config file; makes their data below `folder`, the working directory of the runs."""
    if "demo" in configs:
        command = [sys.executable, "-m", "grain_jax", "aviary", *AVIARY.split()]
        subprocess.run(command, cwd=folder, env=environment(), check=True)
    tiny = harness.config_file(folder, "tiny", TINY)
    return {"tiny": tiny, "demo": REPOSITORY / "configs" / "demo.py"}


def run_seconds(
    folder: epath.Path, config: epath.Path, cache: epath.Path | None
) -> dict[str, float]:
    """Seconds of each part of a run up to its first logged step, and of the whole.

    Raises:
      RuntimeError: the run ended before that step.
    """
    variables = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if cache is not None:
        variables = {"XDG_CACHE_HOME": str(cache)}
    child = environment(**variables)
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        command = [sys.executable, "-m", "grain_jax.train", f"--config={config}"]
        command += [f"--workdir={workdir}", "--config.log_every=1"]
        began = last = time.perf_counter()
        seconds, said, waiting = {}, [], list(PARTS.items())
        piped = dict(stderr=subprocess.PIPE, text=True)
        with subprocess.Popen(command, cwd=folder, env=child, **piped) as process:
            for line in process.stderr:
                said.append(line)
                part, sign = waiting[0]
                if sign in line:
                    now = time.perf_counter()
                    seconds[part], last = now - last, now
                    waiting.pop(0)
                    if not waiting:
                        break
            process.kill()
    if waiting:
        said = "".join(said[-20:])
        raise RuntimeError(f"{' '.join(command)} ended before its first step:\n{said}")
    return seconds | {"whole": last - began}


def start_up(configs: list[str], turns: int) -> dict[str, Any]:
    """Times imports and runs, each in fresh processes, in turns; prints their tables and returns the seconds."""
    imports = {module: [] for module in MODULES}
    parts = (*PARTS, "whole")
    runs = {name: {cache: [] for cache in CACHES} for name in configs}
    with tempfile.TemporaryDirectory() as temporary:
        folder = epath.Path(temporary)
        files = prepare(folder, configs)
        for name in configs:
            run_seconds(folder, files[name], folder / "filled")
        for turn in range(turns):
            for module in MODULES:
                imports[module].append(import_seconds(module))
            for name in configs:
                places = dict(none=None, filled=folder / "filled", empty=folder / f"{name}_{turn}")
                for cache in CACHES:
                    runs[name][cache].append(run_seconds(folder, files[name], places[cache]))
    print(f"{turns} fresh processes each; seconds: median (least - most)")
    for module, seconds in imports.items():
        print(f"import {module:38} {harness.spread(seconds):>22}")
    for name, found in runs.items():
        print(f"{name}, by the cache")
        table = harness.Table(dict(part="22") | dict.fromkeys(CACHES, ">23.1f"))
        for part in parts:
            table.add(part=part, **{c: [run[part] for run in found[c]] for c in CACHES})
    return dict(imports=imports, runs=runs)


def main() -> None:
    """Times starts of training."""
    choices = ["tiny", "demo"]
    args = harness.arguments(__doc__, turns=5, configs=(choices, dict(choices=choices)))
    machine = harness.machine("jax", "jaxlib", "flax", "tensorflow-cpu")
    found = start_up(args.configs, args.turns)
    harness.write(args.json, dict(machine=machine, **found))


if __name__ == "__main__":
    main()
