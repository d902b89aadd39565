"""What an accelerator does with the train step, in one command of at most nine minutes.

    python -m benchmarks.accelerator [--json OUT.json] [--minutes 9] [--sizes B/16 S/16] [--batch 256]

On one GPU or TPU: the parity of the attention programs with float32 (`benchmarks.attention`); images/s, MFU and memory
of the packed bfloat16 step by each attention that the device runs, and of the same step in PyTorch on the same card
(`benchmarks.train_step`); the plan. Parts run one after the other, each in processes that have the memory of the device to themselves; half
the batch where memory runs out. They are ordered by worth: what does not fit into the time is left out and named. On a
CPU everything runs at size tiny, in float32.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from benchmarks import harness
from grain_jax.launch import chips

ROOT = epath.Path(__file__).absolute().parent.parent
# The attention programs that are timed; on a CPU the kernel runs in an interpreter, which says nothing of its speed.
TIMED = {"cpu": ["xla"], "gpu": ["cudnn", "xla"], "tpu": ["pallas", "xla"]}
BATCHES = (256, 128, 64, 32, 16, 8)
FULL = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "out of memory")


class Part(NamedTuple):
    """Something to measure: a command, and the seconds that it takes at least; with less left it does not start."""

    what: str
    command: list[str]
    seconds: float


def parts(platform: str, kind: str, sizes: list[str], batch: int, folder: epath.Path) -> list[Part]:
    """The parts for a device, those first that are worth most."""
    steps, plans = [], []
    chip = next((chip for chip in chips.CHIPS.values() if chip.device_kind == kind), None)
    for size in sizes:
        timed = ["benchmarks.train_step", "--size", size, "--batch", str(batch)]
        steps.append(Part(f"step of {size}", [*timed, "--attention", *TIMED[platform]], 120.0))
        if chip is not None:
            topology = f"{chip.name}:{'x'.join('1' * (chip.axes or 1))}"
            # A whole chip, each device of which does the work that is timed on one.
            of_chip = {"batch_size": batch * chip.devices, "mesh.data": chip.devices}
            keys = of_chip | {"input.source": "synthetic"}
            below = folder / size.replace("/", "_")
            below.mkdir()
            file = harness.config_file(below, size, keys | {"dtype": "bfloat16"})
            plan = ["grain_jax", "plan", f"--config={file}", f"--topology={topology}"]
            plans.append(Part(f"plan of {size}", plan, 15.0))
    first = [Part("parity", ["benchmarks.attention"], 20.0), steps[0], *plans[:1]]
    return [*first, *steps[1:], *plans[1:]]


def run(part: Part, left: Callable[[], float], file: epath.Path) -> dict[str, Any]:
    """Runs a part, with half the batch where memory runs out; its output, its figures, or why it is left out."""
    command = list(part.command)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if command[0] == "grain_jax":
        environment |= {"JAX_PLATFORMS": "cpu"}
    else:
        command += ["--json", str(file)]
    while left() > part.seconds:
        piped = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        words = [sys.executable, "-m", *command]
        try:
            done = subprocess.run(words, env=environment, timeout=left(), **piped)
        except subprocess.TimeoutExpired:
            return dict(left_out="stopped, took more than the time that was left")
        if not done.returncode:
            figures = json.loads(file.read_text()) if file.exists() else None
            return dict(output=done.stdout, figures=figures)
        place = command.index("--batch") + 1 if "--batch" in command else 0
        if not any(sign in done.stdout for sign in FULL) or not place or command[place] == "8":
            line = next(reversed(done.stdout.strip().splitlines()), "")
            return dict(left_out=f"ended with {done.returncode}: {line[:300]}")
        print(f"{part.what}: out of memory at batch {command[place]}", flush=True)
        command[place] = str(int(command[place]) // 2)
    return dict(left_out=f"needs {part.seconds:.0f} s of {max(left(), 0):.0f} left")


def main() -> None:
    """Measures what there is time for, prints the tables, and writes the results after each part."""
    args = harness.arguments(
        __doc__,
        sizes=(str, dict(nargs="+", help="without it B/16 and S/16, on a CPU tiny")),
        batch=(int, dict(choices=BATCHES, help="images (default: 256, on a CPU 16)")),
        minutes=(9.0, dict(help="that the whole may take")),
    )
    end = time.monotonic() + 60 * args.minutes
    platform, kind = harness.device()
    quick = platform == "cpu"
    sizes, batch = args.sizes or (["tiny"] if quick else ["B/16", "S/16"]), args.batch
    batch = batch or (16 if quick else 256)
    results: dict[str, Any] = dict(machine=harness.machine("jax", "jaxlib", "flax"), device=kind)
    with tempfile.TemporaryDirectory() as temporary:
        folder = epath.Path(temporary)
        for number, part in enumerate(parts(platform, kind, sizes, batch, folder)):
            print(f"\n== {part.what}", flush=True)
            found = run(part, lambda: end - time.monotonic(), folder / f"{number}.json")
            print(found.get("output") or f"{part.what}: left out, {found['left_out']}", flush=True)
            results[part.what] = found.get("figures") or found
            harness.write(args.json, results)


if __name__ == "__main__":
    main()
