"""What an accelerator does with the train step, in one command of at most nine minutes.

    python -m benchmarks.accelerator [--json OUT.json] [--minutes 9] [--sizes B/16 S/16] [--batch 256]

On one GPU or TPU: the parity of the attention programs with float32; images/s, MFU and memory of the packed bfloat16
step by each attention that the device runs; the same step in PyTorch on the same card; the ten operations that take
longest; plan against measured; the wait for input of a short training. Parts run one after the other, each in a process
of its own, which has the memory of the device to itself. They are ordered by worth: what does not fit into the time is
left out and named. The results are written after each row. On a CPU everything runs at size tiny, in float32.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import harness
from benchmarks.accelerator import attention, parts, processes
from benchmarks.accelerator.processes import Budget, Part
from benchmarks.accelerator.tables import tables

# The attention programs that are timed; on a CPU the kernel runs in an interpreter, which says nothing of its speed.
TIMED = {"cpu": ["xla"], "gpu": ["cudnn", "xla"], "tpu": ["pallas", "xla"]}
COMPARED = {"cpu": ["xla", "pallas"], "gpu": ["xla", "cudnn"], "tpu": ["xla", "pallas"]}
TOP = 10  # operations of the profile
END_SECONDS = 10.0  # of the time, for the end of a process and the tables
ON_CPU = {"JAX_PLATFORMS": "cpu"}  # for a part in which JAX makes weights or plans alone


def plan_of_parts(device: Mapping[str, Any], batches: Mapping[str, int]) -> list[Part]:
    """The parts for a device, those first that are worth most; `batches` is size -> images."""
    platform = device["platform"]
    quick = platform == "cpu"
    first, *others = TIMED[platform]
    of = {size: dict(size=size, batch=batch) for size, batch in batches.items()}

    def ours(size, attention):
        given = of[size] | dict(attention=attention, profile=first)
        return Part("step", f"{size}, {attention}", parts.our_step, given, 45.0)

    def theirs(size):
        given = of[size] | dict(platform=platform)
        return Part("step", f"{size}, PyTorch", parts.torch_step, given, 60.0, ON_CPU)

    def planned(size):
        given = of[size] | dict(kind=device["kind"], attention=first)
        return Part("plan", f"plan of {size}", parts.plan, given, 15.0, ON_CPU)

    largest, *smaller = batches
    compared = dict(programs=COMPARED[platform], small=quick)
    return [
        Part("parity", "parity", attention.rows, compared, 20.0),
        ours(largest, first),
        theirs(largest),
        *[ours(largest, attention) for attention in others],
        planned(largest),
        *[ours(size, first) for size in smaller],
        *[theirs(size) for size in smaller],
        Part("input", "input wait", parts.input_wait, of[largest] | dict(quick=quick), 45.0),
        *[ours(size, attention) for size in smaller for attention in others],
        *[planned(size) for size in smaller],
    ]


def measure(
    todo: list[Part], budget: Budget, results: dict[str, Any], write: Callable[[], None]
) -> None:
    """Runs the parts while there is time; adds rows, and lines about what is missing, to `results`."""
    for part in todo:
        left = budget.left() - END_SECONDS
        if left < part.seconds:
            needs = f"needs {part.seconds:.0f} s of {max(left, 0):.0f} left"
            say(results, f"{part.what}: left out, {needs}")
            write()
            continue
        print(f"{part.what}: {left:.0f} s are left", file=sys.stderr, flush=True)
        for row in processes.rows(part, left):
            if "left_out" in row:
                say(results, f"{part.what}: {row['left_out']}")
            elif "operations" in row:
                results["operations"] = dict(of=part.what, rows=row["operations"][:TOP])
            else:
                results.setdefault(part.table, []).append(row)
            write()


def say(results: dict[str, Any], line: str) -> None:
    """Prints a line about what is missing, and keeps it."""
    results.setdefault("left_out", []).append(line)
    print(line, flush=True)


def main() -> int:
    """Measures what there is time for, prints the tables, and writes the results after each row."""
    sizes = dict(nargs="+", choices=parts.SIZES, help="without it B/16 and S/16, on a CPU tiny")
    args = harness.arguments(
        __doc__,
        sizes=(str, sizes),
        batch=(int, dict(help="images; without it what fits, at most 256")),
        minutes=(9.0, dict(help="that the whole may take")),
    )
    budget = Budget(args.minutes)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    results: dict[str, Any] = dict(machine=harness.machine("jax", "jaxlib", "flax"))
    results["minutes"] = args.minutes
    look = Part("device", "the device", parts.look, dict(sizes=args.sizes, batch=args.batch), 0.0)
    measure([look], budget, results, lambda: None)
    if "device" not in results:
        return 1
    device = results["device"] = results["device"][0]
    print(f"{device['kind']} ({device['platform']})", flush=True)
    todo = plan_of_parts(device, device["batches"])
    measure(todo, budget, results, lambda: harness.write(args.json, results))
    print(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
