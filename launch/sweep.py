"""Trains every point of a sweep, then tabulates: grain-jax sweep --config X --sweep Y --workdir DIR

Every point is checked before anything starts; the same command again goes on with what is not finished.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

from etils import epath

from grain_jax import config as config_lib
from grain_jax.cli import process
from grain_jax.config import loading
from grain_jax.core import atomic, errors, progress
from grain_jax.launch import jobs, sweep_clusters, sweep_runs, sweep_table
from grain_jax.launch.arguments import Sweep
from grain_jax.launch.sweep_runs import SweepRun, finished, local_folder


def train_here(runs: Sequence[SweepRun], workdir: epath.Path, parallel: int) -> jobs.Runner:
    """Trains the runs that are not finished on this machine, `parallel` at a time.

    Raises:
      UserError: another sweep has the workdir, or a trainer one of the runs, as after a killed sweep.
    """
    from grain_jax.runtime import lock  # imports JAX

    with lock.held(workdir):
        left = [run for run in runs if not finished(run)]
        for run in left:
            if (run.folder / lock.FILE).exists():
                with lock.held(run.folder):
                    pass
        if done := len(runs) - len(left):
            print(f"sweep: {done} of {len(runs)} runs finished before", file=sys.stderr)

        for run in left:  # two runs that start at once would both make it
            if command := sweep_runs.makes_dataset(run):
                if status := subprocess.run([sys.executable, "-m", *command]).returncode:
                    said = f"python -m {shlex.join(command)} ended with {status}"
                    raise errors.UserError(f"input.prepare: {said}")
        here, start = local_folder(workdir), (sys.executable, "-m", "grain_jax.train")
        runner = jobs.Runner(
            [jobs.LocalJob(x.name, (*start, *x.arguments), here / x.name / "log.txt") for x in left],
            jobs.slots(parallel),
            progress.ProgressLine("sweep: "),
            # Runs that differ in their seed alone share a compiled program.
            environment={"JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"), **os.environ},
        )
        runner.run()
    return runner


def tabulate(runs: Sequence[SweepRun], workdir: epath.Path, metric: str | None) -> None:
    """Prints the table and writes sweep.csv."""
    rows = sweep_table.read(runs)
    metric = metric or sweep_table.default_metric(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    if keys and metric not in keys:
        raise errors.UserError(f"--metric: {metric}: {config_lib.unknown_key(metric, keys)}")
    lower = sweep_table.lower_is_better(metric, runs[0].config)
    print(sweep_table.text(rows, metric, lower))
    workdir.mkdir(parents=True, exist_ok=True)
    atomic.write_text(workdir / "sweep.csv", sweep_table.csv_text(rows, metric, lower))
    print(f"{workdir}: sweep.csv", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, trains what is left, tabulates."""
    args = Sweep.parse(arguments)
    loading.load(args.config, args.overrides)  # its own faults come first
    workdir = epath.Path(args.workdir)
    points = sweep_runs.load_points(args.sweep)
    runs = sweep_runs.make_runs(args.config, args.overrides, points, workdir)
    sweep_runs.check_folders(runs)
    if args.dry_run:
        for run in runs:
            print(shlex.join(("grain-jax", "train", *run.arguments)))
        print(f"{len(runs)} points, all valid; nothing was started")
        return 0
    if args.launcher != "local" and not args.table:
        print(sweep_clusters.write(args.launcher, runs, workdir, args.parallel))
        return 0
    failed = []
    if not args.table:
        runner = train_here(runs, workdir, args.parallel or 1)
        if runner.stopped_by:
            print("sweep: stopped; the same command goes on", file=sys.stderr)
            return 130 if runner.stopped_by == signal.SIGINT else jobs.PREEMPTED
        failed = runner.failed
    tabulate(runs, workdir, args.metric)
    if failed:
        counts = f"{len(failed)} of {len(runs)} runs failed: {' '.join(failed)}"
        print(f"sweep: {counts}; the same command starts them again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    process.run(main)
