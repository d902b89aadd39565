"""Training the runs of a study, each in a process of its own, as many at a time as there are jobs."""

import json
import os
import pathlib
import statistics
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from benchmarks.claim.results import TRAINED, ClaimError
from grain_jax.core import errors, progress
from grain_jax.launch import jobs


def train(config: Any, workdir: pathlib.Path, measures: Mapping[str, str]) -> dict[str, Any]:
    """Trains and evaluates a config (a ConfigDict) in this process.

    Args:
      config: of the run.
      workdir: of the run.
      measures: column -> name in results.json.

    Returns:
      The row of the run: of `measures` those that it has, the means of the last five lines of metrics.jsonl, device,
      versions, speed, FLOPs and time.
    """
    import jax

    from grain_jax import config as config_lib
    from grain_jax import train as trainer
    from grain_jax.models.grain import GRAIN
    from grain_jax.runtime import checkpoint, metrics_file
    from grain_jax.training import flops, forward, optim, phases, sharding, train_step

    trainer.keep_freed_memory()
    began = time.monotonic()
    trainer.train(config_lib.from_dict(config), epath.Path(workdir))
    seconds = time.monotonic() - began
    resolved, _ = checkpoint.newest_config(workdir)
    assert resolved is not None
    lines = [line.values for line in metrics_file.read([workdir / metrics_file.FILE])[0]]
    model = GRAIN(resolved.model, resolved.dtype, resolved.remat)
    tx = optim.optimizer(resolved.optim, lambda step: 0.0)
    state = jax.eval_shape(lambda: sharding.unbox(train_step.init_state(model, resolved, tx)))
    steps = lines[-1]["step"]
    found = phases.of(resolved, steps)
    shares = phases.shares(found, steps)

    def count(phase: phases.Phase) -> int:
        """FLOPs of a step of that phase."""
        part = phases.at(resolved, phase)
        on = dict.fromkeys({*resolved.loss.schedules} - {*phase.off}, 1.0)
        return flops.matmul_flops(
            lambda p, b: train_step.loss_and_grads(model, part, None, p, b, None, None, on),
            state.params,
            forward.abstract_batch(part),
        )

    rate = statistics.median_high(line["images_per_second"] for line in lines)
    row = {
        "batch_size": resolved.batch_size,
        "seconds": round(seconds, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "images_per_second": round(rate, 1),
        "flops_per_step": round(sum(share * count(phase) for share, phase in zip(shares, found))),
    }
    for key in (key for key in TRAINED if key in lines[-1]):
        row[key] = round(statistics.mean(line[key] for line in lines[-5:]), 6)
    evaluated = json.loads((workdir / "results.json").read_text())
    numbers = {column: evaluated.get(f"eval/{key}") for column, key in measures.items()}
    return row | {key: round(value, 6) for key, value in numbers.items() if value is not None}


def run_all(
    what: str,
    args: Namespace,
    names: Callable[[], Iterable[str]],
    finished: Callable[[str], bool],
    flags: Sequence[str],
) -> int:
    """Trains every run that is not finished by the command train of its module; returns the exit status.

    Args:
      what: module of the study, below benchmarks.
      args: its arguments, with workdir and jobs.
      names: names of the runs, the most informative first; they may grow with the results.
      finished: whether the run of that name has its row.
      flags: names of the arguments that the command is given, besides --run.

    Raises:
      ClaimError: runs have failed.
    """
    logs = epath.Path(args.workdir / "logs")
    given = {name: getattr(args, name) for name in flags}
    words = [f"--{n}" if v is True else f"--{n}={v}" for n, v in given.items() if v]
    command = (sys.executable, "-m", f"benchmarks.{what}", "train", *words)
    compiled = str(args.workdir.resolve() / "compiled")  # shared by runs that differ in their seed
    outcome = jobs.Runner(
        jobs=lambda: [
            jobs.Job(name, (*command, f"--run={name}"), logs / f"{name}.log") for name in names()
        ],
        finished=lambda job: finished(job.name),
        slots=jobs.slots(args.jobs),
        screen=progress.Line(f"{what.rpartition('.')[2]}: "),
        environment={"JAX_COMPILATION_CACHE_DIR": compiled, **os.environ},
    ).run()
    if outcome.failed:
        failed = " ".join(outcome.failed)
        raise ClaimError(f"{len(outcome.failed)} runs failed: {failed}; see their logs in {logs}")
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


Commands = Mapping[str, Callable[[Namespace], int]]


def parser(what: str, doc: str, commands: Commands, steps: int) -> ArgumentParser:
    """The flags that every study has; `what` is its module."""
    options = dict(description=doc, formatter_class=RawDescriptionHelpFormatter)
    out = ArgumentParser(f"python -m {what}", **options)
    out.add_argument("command", choices=commands, metavar="run|report")
    out.add_argument("--steps", type=int, default=steps, help=f"default: {steps}")
    cores = len(os.sched_getaffinity(0))
    out.add_argument("--jobs", type=int, default=cores, help="default: one a core")
    out.add_argument("--run", metavar="NAME", help=SUPPRESS)  # of the command train
    return out


def call(prog: str, commands: Commands, args: Namespace) -> int:
    """Runs the command of these arguments; returns the exit status."""
    try:
        return commands[args.command](args)
    except errors.UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.status
