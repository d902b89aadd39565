"""Trains every point of a sweep, then tabulates: python -m launch.sweep --config X.py --sweep configs/sweeps/Y.py --workdir DIR

    [--launcher local|slurm|gke] [--parallel N] [--retries N] [--metric eval/NAME/KEY] [--dry-run] [--table]
    [--config.a.b=value ...]

`sweep()` of the sweep file yields flat overrides, such as {"optim.learning_rate": 1e-3, "seed": 1}. Every
point is checked before anything starts. Each run has a folder of its own below DIR, named after what differs.
The same command again skips what is finished, goes on with what is not, and tabulates (docs/sweeps.md).
"""

import dataclasses
import hashlib
import json
import os
import re
import runpy
import shlex
import signal
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from shutil import which
from typing import Any

from absl import flags
from etils import epath

from grain_jax import config as config_lib
from grain_jax import errors
from grain_jax.input_pipeline import derived
from grain_jax.runtime import command_line
from launch import jobs, sweep_table

LAUNCHERS = ("local", "slurm", "gke")
HERE = epath.Path(__file__).parent
DEFINING = {"order", "numbers", "result"}  # roles of the keys that may not change between two calls
_LONGEST_NAME = 200  # characters; file systems end at 255


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of a sweep."""

    name: str
    overrides: Mapping[str, Any]  # config key -> value
    swept: Mapping[str, Any]  # the same for the keys that differ between points
    config: config_lib.Config
    arguments: tuple[str, ...]  # of grain_jax.train
    folder: epath.Path

    @property
    def command(self) -> tuple[str, ...]:
        """What trains it."""
        return ("python", "-m", "grain_jax.train", *self.arguments)


def load_points(path: epath.PathLike) -> list[dict[str, Any]]:
    """The flat overrides that the sweep file's `sweep()` yields.

    Raises:
      UserError: no such file, no such function, it fails, or it yields nothing or no dicts of leaves.
    """
    with command_line.running_file(str(path), "sweep"):
        sweep = runpy.run_path(str(path)).get("sweep")
        points = None if sweep is None else list(sweep())
    if points is None:
        raise errors.UserError(f"--sweep: {path} has no function sweep() that yields overrides")
    if not points:
        raise errors.UserError(f"--sweep: {path}: sweep() yields no point")
    for number, point in enumerate(points, 1):
        if not isinstance(point, Mapping):
            raise errors.UserError(
                f"--sweep: {path}: point {number} is {point!r}, expected a dict such as"
                " {'optim.learning_rate': 1e-3}"
            )
    return [dict(point) for point in points]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def resolve(
    base: config_lib.Config, overrides: Mapping[str, Any], given: Sequence[str] = ()
) -> config_lib.Config:
    """`base` with a point's overrides, as the trainer's command line would have it.

    Args:
      base: the config with the overrides of this command line.
      overrides: flat; of `total_steps` and `total_epochs`, and of the warm-up's two lengths, one that is
        set here unsets the other.
      given: the keys that this command line sets.

    Raises:
      UserError: a key that does not exist, a value of the wrong kind or out of bounds; a line each.
    """
    tree = dataclasses.asdict(base)
    known = flatten(tree)
    faults = []
    for key, value in overrides.items():
        if key not in known:
            inside = [k for k in known if k.startswith(f"{key}.")]
            faults.append(
                f"{key}: is a group of keys; set them one by one, such as {inside[0]}"
                if inside
                else f"{key}: {config_lib.unknown_key(str(key), list(known))}"
            )
        elif key in given:
            faults.append(f"{key}: the sweep and the command line both set it; leave one out")
        elif value is None or not isinstance(value, (bool, int, float, str, tuple)):
            faults.append(f"{key}: got {value!r}, expected a number, a string, a bool or a tuple")
    if faults:
        raise errors.UserError("\n".join(faults))
    changed = dict(overrides)
    for pair in config_lib.EITHER_OR:
        for key, other in (pair, pair[::-1]):
            if key in overrides and other not in (*overrides, *given):
                changed[other] = None
    for key, value in changed.items():
        *groups, leaf = key.split(".")
        part = tree
        for group in groups:
            part = part[group]
        part[leaf] = value
    return config_lib.from_dict(tree)


def _short(value: Any) -> str:
    """A value as it stands in a run's name: digits as few as tell it, nothing that a path cannot hold."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


def name_points(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A readable name for each point, e.g. `learning_rate=0.001,seed=1`: what differs between them.

    Raises:
      UserError: two points are the same, or a name is too long for a folder.
    """
    columns: dict[str, list[Any]] = {}
    for point in points:
        for key in point:
            columns.setdefault(key, [p.get(key) for p in points])
    differ = [k for k, v in columns.items() if any(x != v[0] for x in v[1:])] or list(columns)
    leaves = [key.rpartition(".")[2] for key in differ]
    label = {k: k if leaves.count(leaf) > 1 else leaf for k, leaf in zip(differ, leaves)}
    names: list[str] = []
    for number, point in enumerate(points, 1):
        parts = [f"{label[key]}={_short(point[key])}" for key in differ if key in point]
        name = ",".join(parts) or "base"
        if name in names:
            raise errors.UserError(
                f"--sweep: points {names.index(name) + 1} and {number} are both {name}; expected each"
                " once"
            )
        if len(name) > _LONGEST_NAME:
            raise errors.UserError(
                f"--sweep: point {number}: its name has {len(name)} characters, expected at most"
                f" {_LONGEST_NAME}; sweep over fewer keys at a time: {name}"
            )
        names.append(name)
    return names


def make_runs(
    base: config_lib.Config,
    base_arguments: Sequence[str],
    points: Sequence[Mapping[str, Any]],
    workdir: epath.Path,
) -> list[Run]:
    """The sweep's runs, each with its checked config.

    Args:
      base: the config with the overrides of this command line.
      base_arguments: `--config=FILE` and those overrides.
      points: as `load_points` gives them.
      workdir: the runs' folders lie in it.

    Raises:
      UserError: a line for every fault of the points.
    """
    given = [a.partition("=")[0].removeprefix("--config.") for a in base_arguments]
    labels = name_points(points)
    first = points[0]
    differ = {k for p in points for k in p if k not in first or p[k] != first[k]}
    differ |= {k for k in first if any(k not in p for p in points)}
    runs: list[Run] = []
    faults: dict[str, list[str]] = {}  # fault -> the points that have it
    for name, point in zip(labels, points):
        try:
            config = resolve(base, point, given)
        except errors.UserError as error:
            for line in str(error).splitlines():
                faults.setdefault(line, []).append(name)
            continue
        folder = workdir / name
        overrides = [f"--config.{key}={value}" for key, value in point.items()]
        values = flatten(dataclasses.asdict(config))
        swept = {
            key: values[key]
            for p in points
            for key in p
            if key in (differ or set(p)) & values.keys()
        }
        arguments = (*base_arguments, *overrides, f"--workdir={folder}")
        runs.append(Run(name, point, swept, config, arguments, folder))
    if faults:
        raise errors.UserError(
            "\n".join(
                f"{line} (in {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
                for line, names in faults.items()
            )
        )
    return runs


def check_folders(runs: Sequence[Run]) -> None:
    """Raises UserError where a run's folder was trained with another config: its results are not the point's."""
    faults = []
    for run in runs:
        file = run.folder / "config.json"
        try:
            stored = json.loads(file.read_text()) if file.exists() else None
        except json.JSONDecodeError:  # a kill cut it off; the trainer asks the checkpoint's own
            continue
        if stored is None:
            continue
        old = config_lib.select(stored, DEFINING)
        new = config_lib.select(dataclasses.asdict(run.config), DEFINING)
        faults += [
            f"{run.folder}: was trained with {key} = {old[key]!r}, now it is {new[key]!r}; take"
            " another --workdir, or remove that folder"
            for key in new
            if key in old
            and old[key] != new[key]
            # Where these are not set, the trainer derives them, and config.json has the numbers.
            and not (key in derived.KEYS and new[key] is None)
        ]
    if faults:
        raise errors.UserError("\n".join(faults))


def finished(run: Run) -> bool:
    """Whether the run's last step is logged and saved, and all of the report is there that the trainer then makes."""
    evals = run.config.evals.values()
    report = ["curves.png"]
    if evals:
        report.append("results.json")
    if run.config.pictures and any(entry.kind == "grounding" for entry in evals):
        report.append("regions.png")
    if not all((run.folder / name).exists() for name in report):
        return False
    from grain_jax.runtime import checkpoint  # JAX: seconds, and only for what may be finished

    step = sweep_table.last_step(run.folder)
    # Only the data set can turn a length in epochs into steps.
    return step in checkpoint.finished_steps(run.folder) and run.config.total_steps in (None, step)


def share_done(run: Run) -> float:
    """How much of the run is done, 0 to 1; 0 where its length is not known."""
    if run.config.total_steps is None:
        return 0.0
    return sweep_table.last_step(run.folder) / run.config.total_steps


def local_folder(workdir: epath.Path) -> epath.Path:
    """Where logs and job files of a sweep lie: its workdir, or a folder of this machine if that is remote."""
    if "://" not in str(workdir):
        return workdir
    return epath.Path("runs/sweeps") / re.sub(r"\W+", "_", str(workdir).partition("://")[2])


def train_here(
    runs: Sequence[Run], workdir: epath.Path, metric: str | None, parallel: int, retries: int
) -> jobs.Outcome:
    """Trains the runs on this machine, `parallel` at a time."""
    here = local_folder(workdir)
    by_name = {run.name: run for run in runs}
    all_jobs = [
        jobs.Job(run.name, (sys.executable, *run.command[1:]), here / run.name / "log.txt")
        for run in runs
    ]

    def data_set(run: Run) -> tuple[str, str]:
        return run.config.input.data_dir, run.config.input.name

    def ready(job: jobs.Job, running: frozenset[str]) -> bool:
        """Where runs make a data set that they share, the first one goes alone until it is there."""
        run = by_name[job.name]
        if run.config.input.source == "synthetic" or not run.config.input.prepare:
            return True
        same = [other for other in runs if data_set(other) == data_set(run)]
        return not any(other.name in running for other in same) or any(
            (other.folder / "config.json").exists()
            for other in same  # written after the data is found
        )

    runner = jobs.Runner(
        jobs=lambda: all_jobs,
        finished=lambda job: finished(by_name[job.name]),
        slots=jobs.slots(parallel),
        screen=jobs.Screen("sweep: "),
        ready=ready,
        share_done=lambda job: share_done(by_name[job.name]),
        result=lambda job: sweep_table.summary(by_name[job.name], metric),
        retries=retries,
        # Runs that differ in their seed alone share a compiled program.
        environment={"JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"), **os.environ},
    )
    return runner.run()


def _unfinished(runs: Sequence[Run], launcher: str) -> list[Run]:
    """The runs to hand to a cluster, which takes their arguments as words between blanks."""
    left = [run for run in runs if not finished(run)]
    for run in left:
        for argument in run.arguments:
            if shlex.quote(argument) != argument:
                raise errors.UserError(
                    f"{run.name}: {argument!r}: --launcher={launcher} takes arguments without blanks,"
                    " quotes and brackets only"
                )
        data = run.config.input
        folder = epath.Path(data.data_dir) / data.name
        if data.source == "records" and data.prepare and not folder.exists():
            raise errors.UserError(
                f"{folder}: no data set yet, and every run would make it (input.prepare); make it first: "
                f"python -m {data.prepare.format(**vars(data))}"
            )
    return left


def submit_slurm(runs: Sequence[Run], workdir: epath.Path, parallel: int | None) -> str:
    """Submits the unfinished runs as one job array, through launch/slurm.sbatch; returns what to tell.

    Raises:
      UserError: the array that was submitted before is still there, or sbatch refuses.
    """
    folder = local_folder(workdir) / "slurm"
    number = folder / "job.txt"
    if number.exists() and which("squeue"):
        job = number.read_text().strip()
        queue = subprocess.run(
            ["squeue", "--noheader", "--jobs", job], capture_output=True, text=True
        )
        if queue.stdout.strip():
            raise errors.UserError(
                f"job {job} of this sweep is still in the queue (squeue --jobs {job}); --table shows how"
                f" far it is; scancel {job} to submit anew"
            )
    left = _unfinished(runs, "slurm")
    if not left:
        return "nothing to submit"
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "arguments.txt"
    lines.write_text("".join(" ".join(run.arguments) + "\n" for run in left))
    throttle = f"%{parallel}" if parallel else ""
    command = ["sbatch", "--parsable", f"--array=1-{len(left)}{throttle}"]
    command += [f"--output={folder.resolve()}/%A_%a.log", str(HERE / "slurm.sbatch")]
    variables = {"GRAIN_ARGS_FILE": str(lines.resolve())}
    if not which("sbatch"):
        return f"no sbatch here; where there is one: GRAIN_ARGS_FILE={lines.resolve()} {shlex.join(command)}"
    sent = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if sent.returncode:
        raise errors.UserError(f"sbatch: {' '.join(sent.stderr.split())}")
    job = sent.stdout.strip().partition(";")[0]
    number.write_text(f"{job}\n")
    return (
        f"submitted {len(left)} runs as job {job}; logs in {folder}, --table shows how far they are"
    )


def jobset_name(run: Run) -> str:
    """A name that Kubernetes takes, always the same for the same folder."""
    word = re.sub(r"[^a-z0-9]+", "-", run.folder.parent.name.lower()).strip("-")[:20].strip("-")
    return f"{word or 'sweep'}-{hashlib.sha256(str(run.folder).encode()).hexdigest()[:8]}"


def render_gke(run: Run, template: str) -> str:
    """launch/gke.yaml for one run: ${NAME} and ${ARGS} are the run's, the rest comes from the environment.

    Raises:
      UserError: a variable of the template that is not set.
    """
    values = {**os.environ, "NAME": jobset_name(run), "ARGS": " ".join(run.arguments)}
    page = string.Template(template)
    missing = [name for name in page.get_identifiers() if name not in values]
    if missing:
        raise errors.UserError(
            f"launch/gke.yaml: set {', '.join(missing)} in the environment; its head says what they are"
        )
    return page.substitute(values)


def apply_gke(runs: Sequence[Run], workdir: epath.Path) -> str:
    """Renders one JobSet for each unfinished run and applies it where there is kubectl; returns what to tell."""
    left = _unfinished(runs, "gke")
    folder = local_folder(workdir) / "gke"
    folder.mkdir(parents=True, exist_ok=True)
    template = (HERE / "gke.yaml").read_text()
    pages = [(folder / f"{run.name}.yaml", run, render_gke(run, template)) for run in left]
    for path, _, page in pages:
        path.write_text(page)
    if not which("kubectl"):
        return f"rendered {len(left)} JobSets into {folder}; no kubectl here to apply them"
    for path, run, _ in pages:
        name = ("jobset", jobset_name(run))
        state = _kubectl("get", *name, "--ignore-not-found", "-o=jsonpath={.status.terminalState}")
        if state == "Failed":  # such a one is never started again
            _kubectl("delete", *name)
        _kubectl("apply", "-f", str(path))
    return f"applied {len(left)} JobSets of {folder}; --table shows how far they are"


def _kubectl(*arguments: str) -> str:
    done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise errors.UserError(f"kubectl {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def check_metric(metric: str | None, config: config_lib.Config) -> None:
    """Raises UserError if the metric is of an evaluator that the config does not have."""
    if metric and metric.startswith("eval/"):
        name = metric.split("/")[1]
        if name not in config.evals:
            near = config_lib.unknown_key(name, list(config.evals)) if config.evals else "has none"
            raise errors.UserError(f"--metric: {metric}: no evaluator {name} in the config: {near}")


def tabulate(runs: Sequence[Run], workdir: epath.Path, metric: str | None) -> None:
    """Prints the table and writes sweep.csv and sweep.png."""
    rows = sweep_table.read(runs, [finished(run) for run in runs])
    metric = metric or sweep_table.default_metric(rows)
    sweep_table.check(rows, metric)
    print(sweep_table.text(rows, metric))
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "sweep.csv").write_text(sweep_table.csv_text(rows, metric))
    written = "sweep.csv"
    if sweep_table.picture(rows, metric, workdir / "sweep.png"):
        written += " and sweep.png"
    print(f"{workdir}: {written}", file=sys.stderr)


def show_plan(runs: Sequence[Run]) -> None:
    """What would be done: names, where they stand, commands."""
    for run in runs:
        step = sweep_table.last_step(run.folder)
        state = "finished" if finished(run) else f"resumes (step {step})" if step else "new"
        print(f"{run.name}: {state}\n  {shlex.join(run.command)}")
    print(f"{len(runs)} points, all valid; nothing was started")


def _base_arguments(argv: Sequence[str]) -> tuple[str, ...]:
    """`--config=FILE` and the config's overrides, of a command line that was parsed."""
    words = [re.sub(r"^-(?=\w)", "--", word) for word in argv[1:]]
    out = []
    for word, following in zip(words, [*words[1:], ""]):
        if word == "--config":
            out.append(f"--config={following}")
        elif re.match(r"--config[=.]", word):
            out.append(word)
    return tuple(out)


def define_flags() -> flags.FlagHolder:
    """The command's flags; returns that of `--config`."""
    flags.DEFINE_string("sweep", None, "sweep file, e.g. configs/sweeps/learning_rate.py")
    flags.DEFINE_string("workdir", None, "folder of the sweep; each run has one in it")
    flags.DEFINE_enum("launcher", "local", LAUNCHERS, "where the runs are trained")
    flags.DEFINE_integer("parallel", None, "runs at a time; default: local 1, else all", 1)
    flags.DEFINE_integer("retries", 1, "how often a local run that fails is started again", 0)
    flags.DEFINE_string("metric", None, "what the table is sorted by; default: the first accuracy")
    flags.DEFINE_bool("dry_run", False, "check every point and print the commands, start nothing")
    flags.DEFINE_bool("table", False, "only tabulate what is there")
    return command_line.define_config()


def main(argv: list[str]) -> int:
    """Parses the command line, trains what is left, tabulates."""
    command_line.show_help(argv, __doc__)
    argv = [re.sub("^--?dry-run", "--dry_run", a) for a in argv]
    base = command_line.parse_config(argv, define_flags())
    given = flags.FLAGS
    for name in ("sweep", "workdir"):
        if not given[name].value:
            raise errors.UserError(f"--{name}: missing; {given[name].help}")
    workdir = epath.Path(given["workdir"].value)
    metric, parallel = given["metric"].value, given["parallel"].value
    check_metric(metric, base)
    runs = make_runs(base, _base_arguments(argv), load_points(given["sweep"].value), workdir)
    check_folders(runs)
    if given["dry_run"].value:
        show_plan(runs)
        return 0
    if not given["table"].value:
        if given["launcher"].value != "local":
            submit = {
                "slurm": lambda: submit_slurm(runs, workdir, parallel),
                "gke": lambda: apply_gke(runs, workdir),
            }[given["launcher"].value]
            print(f"sweep: {submit()}", file=sys.stderr)
            if not all(map(finished, runs)):
                return 0
        else:
            outcome = train_here(runs, workdir, metric, parallel or 1, given["retries"].value)
            if outcome.stopped_by:
                print(
                    f"sweep: stopped; {len(outcome.done)} of {len(runs)} runs are finished, the same"
                    " command goes on",
                    file=sys.stderr,
                )
                return 130 if outcome.stopped_by == signal.SIGINT else jobs.PREEMPTED
            if outcome.failed:
                tabulate(runs, workdir, metric)
                print(
                    f"sweep: {len(outcome.failed)} of {len(runs)} runs failed:"
                    f" {' '.join(outcome.failed)}; the same command starts them again",
                    file=sys.stderr,
                )
                return 1
    tabulate(runs, workdir, metric)
    return 0


if __name__ == "__main__":
    command_line.main(main)
