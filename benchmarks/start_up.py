"""Start-up time of training: imports, compilation, first step; with and without the compilation cache.

    python -m benchmarks.start_up [--repeats 5] [--configs tiny demo] [--json OUT.json]

Every figure comes from a fresh process. `tiny` is the size tiny on the synthetic source, `demo` configs/demo.py on a small
aviary, which is drawn first. The lines of the trainer on stderr divide a run into parts: state, compilation, first
step; then the run is killed. The compilation cache is off, empty, or filled by an earlier run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from etils import epath

from benchmarks import side_by_side

REPOSITORY = epath.Path(__file__).absolute().parent.parent
MODULES = ("grain_jax", "jax", "grain_jax.train", "grain_jax.input_pipeline.records")
CACHES = ("none", "empty", "filled")
# Part of a run -> text in the line of the trainer that ends it.
PARTS = {
    "imports, data, state": "device(s), mesh",
    "compiling": "compiled in",
    "first step": "step 1/",
}
DEMO_IMAGES = 1024
_TINY = """
from grain_jax.recipe import base


def get_config():
    c = base("tiny")
    c.total_steps, c.batch_size, c.dtype, c.optim.warmup_steps = 1400, 64, "float32", 100
    c.input.source, c.input.lanes = "synthetic", 4
    c.text.pack_group, c.text.pack_rows = 16, 10
    return c
"""


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
    tiny = folder / "tiny.py"
    tiny.write_text(_TINY)
    if "demo" in configs:
        command = f"data.aviary --output runs/aviary --records runs/aviary/records --name aviary --images {DEMO_IMAGES}"
        subprocess.run(
            [sys.executable, "-m", *command.split()], cwd=folder, env=environment(), check=True
        )
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
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        command = [
            sys.executable,
            "-m",
            "grain_jax.train",
            f"--config={config}",
            f"--workdir={workdir}",
        ]
        began = last = time.perf_counter()
        seconds, said, waiting = {}, [], list(PARTS.items())
        with subprocess.Popen(
            [*command, "--config.log_every=1"],
            cwd=folder,
            env=environment(**variables),
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
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
        raise RuntimeError(
            f"{' '.join(command)} ended before its first step:\n{''.join(said[-20:])}"
        )
    return seconds | {"whole": last - began}


def main() -> int:
    """Times everything `--repeats` times, in turns, and prints medians and spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--configs", nargs="+", choices=("tiny", "demo"), default=["tiny", "demo"])
    parser.add_argument("--json", type=epath.Path)
    args = parser.parse_args()
    machine = side_by_side.machine("jax", "jaxlib", "flax", "tensorflow-cpu")
    imports: dict[str, list[float]] = {module: [] for module in MODULES}
    runs: dict[str, dict[str, dict[str, list[float]]]] = {
        name: {cache: {part: [] for part in (*PARTS, "whole")} for cache in CACHES}
        for name in args.configs
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = epath.Path(temporary)
        files = prepare(folder, args.configs)
        for name in args.configs:
            run_seconds(folder, files[name], folder / "filled")
        for repeat in range(args.repeats):
            for module in MODULES:
                imports[module].append(import_seconds(module))
            for name, caches in runs.items():
                for cache, parts in caches.items():
                    place = {
                        "none": None,
                        "empty": folder / f"{name}_{repeat}",
                        "filled": folder / "filled",
                    }
                    for part, seconds in run_seconds(folder, files[name], place[cache]).items():
                        parts[part].append(seconds)
    print(side_by_side.on(machine))
    print(f"{args.repeats} fresh processes each; seconds: median (least - most)")
    for module, seconds in imports.items():
        print(f"import {module:38} {side_by_side.spread(seconds):>22}")
    for name, caches in runs.items():
        print(f"{name:22}" + "".join(f"{'cache: ' + cache:>24}" for cache in CACHES))
        for part in (*PARTS, "whole"):
            cells = "".join(
                f"{side_by_side.spread(caches[cache][part], digits=1):>24}" for cache in CACHES
            )
            print(f"  {part:20}{cells}")
        saved = statistics.median(caches["none"]["whole"]) - statistics.median(
            caches["filled"]["whole"]
        )
        print(f"  a filled cache saves {saved:.1f} s")
    side_by_side.write(args.json, dict(machine=machine, imports=imports, runs=runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
