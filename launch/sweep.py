"""Trains every point of a sweep, then tabulates: grain-jax sweep --config X --sweep Y --workdir DIR

Every point is checked before anything starts; the same command again goes on with what is not finished
(docs/sweeps.md).
"""

import os
import shlex
import signal
import sys
from collections.abc import Sequence

from etils import epath

from grain_jax import config as config_lib
from grain_jax.cli import config_file, process
from grain_jax.core import atomic, errors, progress
from grain_jax.launch import jobs, sweep_clusters, sweep_runs, sweep_table
from grain_jax.launch.arguments import Sweep
from grain_jax.launch.sweep_runs import SweepRun, finished, local_folder


def train_here(
    runs: Sequence[SweepRun], workdir: epath.Path, metric: str | None, parallel: int, retries: int
) -> jobs.Outcome:
    """Trains the runs on this machine, `parallel` at a time."""
    here = local_folder(workdir)
    by_name = {run.name: run for run in runs}
    start = (sys.executable, "-m", "grain_jax.train")
    all_jobs = [
        jobs.Job(run.name, (*start, *run.arguments), here / run.name / "log.txt") for run in runs
    ]

    def ready(job: jobs.Job, running: frozenset[str]) -> bool:
        """Of runs that make the same data set, the first runs alone until the data set is complete."""
        data = by_name[job.name].config.input
        if data.source == "synthetic" or not data.prepare:
            return True
        makes = lambda other: (other.config.input.data_dir, other.config.input.name)
        same = [other for other in runs if makes(other) == (data.data_dir, data.name)]
        # config.json is written after the data is found.
        made = any((other.folder / "config.json").exists() for other in same)
        return made or not any(other.name in running for other in same)

    runner = jobs.Runner(
        jobs=lambda: all_jobs,
        finished=lambda job: finished(by_name[job.name]),
        slots=jobs.slots(parallel),
        screen=progress.Line("sweep: "),
        ready=ready,
        share_done=lambda job: sweep_runs.share_done(by_name[job.name]),
        result=lambda job: sweep_table.summary(by_name[job.name], metric),
        retries=retries,
        # Runs that differ in their seed alone share a compiled program.
        environment={"JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"), **os.environ},
    )
    return runner.run()


def check_metric(metric: str | None, config: config_lib.Config) -> None:
    """Raises UserError where the config has no such evaluator."""
    if metric and metric.startswith("eval/"):
        name = metric.split("/")[1]
        if name not in config.evals:
            near = config_lib.unknown_key(name, list(config.evals)) if config.evals else "has none"
            raise errors.UserError(f"--metric: {metric}: no evaluator {name} in the config: {near}")


def tabulate(runs: Sequence[SweepRun], workdir: epath.Path, metric: str | None) -> None:
    """Prints the table and writes sweep.csv and sweep.png."""
    rows = sweep_table.read(runs, [finished(run) for run in runs])
    metric = metric or sweep_table.default_metric(rows)
    sweep_table.check(rows, metric)
    lower = sweep_table.lower_is_better(metric, runs[0].config)
    print(sweep_table.text(rows, metric, lower))
    workdir.mkdir(parents=True, exist_ok=True)
    atomic.write_text(workdir / "sweep.csv", sweep_table.csv_text(rows, metric, lower))
    written = "sweep.csv"
    if sweep_table.draw(rows, metric, lower, workdir / "sweep.png"):
        written += " and sweep.png"
    print(f"{workdir}: {written}", file=sys.stderr)


def show_plan(runs: Sequence[SweepRun]) -> None:
    """Prints name, state and command of each run."""
    for run in runs:
        step = sweep_runs.last_step(run.folder)
        state = "finished" if finished(run) else f"resumes (step {step})" if step else "new"
        print(f"{run.name}: {state}\n  {shlex.join(run.command)}")
    print(f"{len(runs)} points, all valid; nothing was started")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, trains what is left, tabulates."""
    args = Sweep.parse(arguments)
    base = config_file.load(args.config, args.overrides)
    workdir = epath.Path(args.workdir)
    metric, parallel = args.metric, args.parallel
    check_metric(metric, base)
    points = sweep_runs.load_points(args.sweep)
    runs = sweep_runs.make_runs(args.config, args.overrides, points, workdir)
    sweep_runs.check_folders(runs)
    if args.dry_run:
        show_plan(runs)
        return 0
    if args.launcher != "local" and not args.table:
        if args.launcher == "slurm":
            told = sweep_clusters.submit_slurm(runs, workdir, parallel)
        else:
            told = sweep_clusters.apply_gke(runs, workdir)
        print(f"sweep: {told}", file=sys.stderr)
        if not all(map(finished, runs)):
            return 0
    failed = ()
    if args.launcher == "local" and not args.table:
        outcome = train_here(runs, workdir, metric, parallel or 1, args.retries)
        if outcome.stopped_by:
            print(
                f"sweep: stopped; {len(outcome.done)} of {len(runs)} runs are finished, the same"
                " command goes on",
                file=sys.stderr,
            )
            return 130 if outcome.stopped_by == signal.SIGINT else jobs.PREEMPTED
        failed = outcome.failed
    tabulate(runs, workdir, metric)
    if failed:
        print(
            f"sweep: {len(failed)} of {len(runs)} runs failed: {' '.join(failed)}; the same command"
            " starts them again",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    process.run(main)
