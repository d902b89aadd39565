"""What an accelerator does with the train step, in one command of at most nine minutes.

    python -m benchmarks.accelerator [--json OUT.json] [--minutes 9] [--sizes B/16 S/16] [--batch 256]

On one GPU or TPU: the parity of the attention programs with float32; images/s, MFU and memory of the packed bfloat16
step by each attention that the device runs; the same step in PyTorch on the same card; the ten operations that take
longest; plan against measured; the wait for input of a short training. Parts run one after the other, each in a process
of its own, which has the memory of the device to itself. They are ordered by worth: what does not fit into the time is
left out and named. The results are written after each row. On a CPU everything runs at size tiny, in float32.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from benchmarks import accelerator_parts as parts
from benchmarks import side_by_side

# The attention programs that are timed; on a CPU the kernel runs in an interpreter, which says nothing of its speed.
TIMED = {"cpu": ["xla"], "gpu": ["cudnn", "xla"], "tpu": ["pallas", "xla"]}
COMPARED = {"cpu": ["xla", "pallas"], "gpu": ["xla", "cudnn"], "tpu": ["xla", "pallas"]}
TOP = 10  # operations of the profile
END_SECONDS = 10.0  # of the time, for the end of a process and the tables
Rows = list[dict[str, Any]]


class Part(NamedTuple):
    """Something to measure.

    Attributes:
      table: the list of the results that its rows go to.
      what: names it.
      run: yields rows, dictionaries; picklable.
      arguments: of `run`, by keyword.
      seconds: that it takes at least; with less left it does not start.
      environment: variables of its process.
    """

    table: str
    what: str
    run: Callable[..., Iterator[dict[str, Any]]]
    arguments: Mapping[str, Any]
    seconds: float
    environment: Mapping[str, str] = {}


class Budget:
    """The seconds that are left of `minutes`."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self._end - self._clock()


def plan_of_parts(device: Mapping[str, Any], batches: Mapping[str, int]) -> list[Part]:
    """The parts for a device, those first that are worth most; `batches` is size -> images."""
    platform = device["platform"]
    quick = platform == "cpu"
    first, *others = TIMED[platform]

    def ours(size, attention, seconds=45.0):
        arguments = dict(size=size, batch=batches[size], attention=attention, profile=first)
        return Part("step", f"{size}, {attention}", parts.our_step, arguments, seconds)

    def theirs(size):
        arguments = dict(size=size, batch=batches[size], platform=platform)
        on_cpu = {"JAX_PLATFORMS": "cpu"}  # JAX makes the weights alone
        return Part("step", f"{size}, PyTorch", parts.torch_step, arguments, 60.0, on_cpu)

    def planned(size):
        arguments = dict(kind=device["kind"], size=size, batch=batches[size], attention=first)
        on_cpu = {"JAX_PLATFORMS": "cpu"}
        return Part("plan", f"plan of {size}", parts.plan, arguments, 15.0, on_cpu)

    largest, *smaller = batches
    compared = dict(programs=COMPARED[platform], small=quick)
    waits = dict(size=largest, batch=batches[largest], quick=quick)
    out = [
        Part("parity", "parity", parts.parity, compared, 20.0),
        ours(largest, first),
        theirs(largest),
        *[ours(largest, attention) for attention in others],
        planned(largest),
        *[ours(size, first) for size in smaller],
        *[theirs(size) for size in smaller],
        Part("input", "input wait", parts.input_wait, waits, 45.0),
        *[ours(size, attention) for size in smaller for attention in others],
        *[planned(size) for size in smaller],
    ]
    return out


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
        for row in in_own_process(part, left):
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


def in_own_process(part: Part, limit: float) -> Iterator[dict[str, Any]]:
    """The rows of a part as they come; after `limit` seconds its process and those that it started are killed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, part))
    process.start()
    theirs.close()
    end = time.monotonic() + limit
    try:
        while True:
            if not ours.poll(max(0.0, end - time.monotonic())):
                yield dict(left_out=f"stopped, took more than the {limit:.0f} s that were left")
                return
            row = ours.recv()
            if row is None:
                return
            yield row
    except EOFError:
        process.join(timeout=END_SECONDS)
        yield dict(left_out=f"its process ended with status {process.exitcode}")
    finally:
        process.join(timeout=2.0)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # ended, or not yet a group of its own
            process.kill()
        process.join()


def _serve(pipe, part: Part) -> None:
    os.setsid()  # so that the trainer which a part starts ends with it
    os.environ.update(part.environment)
    try:
        for row in part.run(**part.arguments):
            pipe.send(row)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0][:300]
        pipe.send(dict(left_out=f"{type(error).__name__}: {line}"))
    pipe.send(None)


def tables(results: Mapping[str, Any]) -> str:
    """The results as text: a table for each kind of row that there is."""
    out: list[str] = []
    if results.get("step"):
        out += ["", f"{'step':26}{'batch':>6}{'images/s':>10}{'ms: median (least - most)':>30}"]
        out[-1] += f"{'MFU':>7}{'GB at most':>12}{'by compiler':>12}"
        out += [_step_line(row) for row in results["step"]]
        out += ratios(results["step"])
    if results.get("parity"):
        out += ["", f"{'attention, against float32':50}{'values':>10}{'gradients':>11}"]
        for row in results["parity"]:
            name = f"{row['shape']}, {row['program']}, {row['dtype']}"
            out.append(f"{name:50}{row['value']:10.1e}{row['gradient']:11.1e}")
    if results.get("operations"):
        found = results["operations"]
        out += ["", f"{'operation of ' + found['of']:34}{'ms a step':>10}{'share':>7}  part"]
        for row in found["rows"]:
            name = f"{row['name'][:33]:34}{row['ms']:10.3f}"
            out.append(f"{name}{row['share']:7.1%}  {row['where'][-60:]}")
    for row in results.get("plan", []):
        out += ["", _plan_line(row, results.get("step", []))]
    for row in results.get("input", []):
        wait, most = row["wait_fractions"], max(row["wait_fractions"])
        out += [
            "",
            f"waiting for input: {sum(wait) / len(wait):.1%} of the time, at most {most:.1%}",
        ]
        out[-1] += (
            f" in {row['steps_a_line']} steps; {row['what']}, {row['images_per_second']:,.0f} images/s"
        )
    return "\n".join(out)


def _step_line(row: Mapping[str, Any]) -> str:
    spread = side_by_side.spread(row["seconds"], 1e3, 1)
    mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
    memory = "".join(
        f"{'' if row.get(key) is None else format(row[key] / 1e9, '.2f'):>12}"
        for key in ("peak_bytes", "compiled_bytes")
    )
    name = f"{row['size']} {row['side']}"
    return f"{name:26}{row['batch']:6}{row['images_per_second']:10,.1f}{spread:>30}{mfu:>7}{memory}"


def ratios(rows: Rows) -> list[str]:
    """A line for each size that both sides measured: our fastest step in images/s of the PyTorch steps."""
    out = []
    for size in dict.fromkeys(row["size"] for row in rows):
        of = {row["side"]: row["images_per_second"] for row in rows if row["size"] == size}
        best = max((v for side, v in of.items() if side.startswith("ours")), default=None)
        torch = [(side, v) for side, v in of.items() if side.startswith("PyTorch")]
        if best and torch:
            of_each = ", ".join(f"{best / v:.2f} times those of {side}" for side, v in torch)
            out.append(f"{size}: our fastest step does {of_each}")
    return out


def _plan_line(plan: Mapping[str, Any], steps: Rows) -> str:
    """The plan beside the step of the same size, batch and attention."""
    how = "an estimate" if plan["estimate"] else "compiled"
    line = f"plan of {plan['size']}, {plan['batch']} images on {plan['topology']} ({how}):"
    line += f" {plan['bytes'] / 1e9:.2f} GB, at best {plan['seconds'] * 1e3:.1f} ms"
    side = f"ours, {plan['attention']}"
    same = [
        r
        for r in steps
        if (r["size"], r["side"], r["batch"]) == (plan["size"], side, plan["batch"])
    ]
    for row in same:
        median = row["batch"] / row["images_per_second"]
        line += f"; measured {median * 1e3:.1f} ms"
        if row.get("peak_bytes"):
            line += f", at most {row['peak_bytes'] / 1e9:.2f} GB"
    return line


def main() -> int:
    """Measures what there is time for, prints the tables, and writes the results after each row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    help = "without it B/16 and S/16, on a CPU tiny"
    parser.add_argument("--sizes", "--size", nargs="+", choices=parts.SIZES, help=help)
    parser.add_argument("--batch", type=int, help="images; without it what fits, at most 256")
    parser.add_argument("--minutes", type=float, default=9.0, help="that the whole may take")
    parser.add_argument("--json", type=epath.Path)
    args = parser.parse_args()
    budget = Budget(args.minutes)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    machine = side_by_side.machine("jax", "jaxlib", "flax")
    results: dict[str, Any] = dict(machine=machine, minutes=args.minutes)
    look = Part("device", "the device", parts.look, dict(sizes=args.sizes, batch=args.batch), 0.0)
    measure([look], budget, results, lambda: None)
    if "device" not in results:
        return 1
    device = results["device"] = results["device"][0]
    print(f"{device['kind']} ({device['platform']}), {side_by_side.on(machine)}", flush=True)
    todo = plan_of_parts(device, device["batches"])
    measure(todo, budget, results, lambda: side_by_side.write(args.json, results))
    print(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
