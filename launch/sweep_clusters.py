"""Hands the unfinished runs of a sweep to SLURM (a job array) or to Kubernetes (a JobSet each)."""

import hashlib
import os
import re
import shlex
import string
import subprocess
from collections.abc import Sequence
from shutil import which

from etils import epath

from grain_jax.core import errors
from grain_jax.launch.sweep_runs import SweepRun, finished, local_folder

HERE = epath.Path(__file__).parent


def _unfinished(runs: Sequence[SweepRun], launcher: str) -> list[SweepRun]:
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


def submit_slurm(runs: Sequence[SweepRun], workdir: epath.Path, parallel: int | None) -> str:
    """Submits the unfinished runs as one job array, through launch/slurm.sbatch; returns what to tell.

    Raises:
      UserError: the array that was submitted before is still there, or sbatch refuses.
    """
    folder = local_folder(workdir) / "slurm"
    number = folder / "job.txt"
    if number.exists() and which("squeue"):
        job = number.read_text().strip()
        command = ["squeue", "--noheader", "--jobs", job]
        if subprocess.run(command, capture_output=True, text=True).stdout.strip():
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
    job = _output(*command, **variables).partition(";")[0]
    number.write_text(f"{job}\n")
    return (
        f"submitted {len(left)} runs as job {job}; logs in {folder}, --table shows how far they are"
    )


def _output(*command: str, **variables: str) -> str:
    """What a command of the cluster prints."""
    environment = {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        name = " ".join(command[: 2 if command[0] == "kubectl" else 1])
        raise errors.UserError(f"{name}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def jobset_name(run: SweepRun) -> str:
    """A name that Kubernetes takes, always the same for the same folder."""
    word = re.sub(r"[^a-z0-9]+", "-", run.folder.parent.name.lower()).strip("-")[:20].strip("-")
    return f"{word or 'sweep'}-{hashlib.sha256(str(run.folder).encode()).hexdigest()[:8]}"


def render_gke(run: SweepRun, template: str) -> str:
    """launch/gke.yaml for one run: ${NAME} and ${ARGS} are the run's, the rest comes from the environment.

    Raises:
      UserError: a variable of the template that is not set.
    """
    values = {**os.environ, "NAME": jobset_name(run), "ARGS": " ".join(run.arguments)}
    page = string.Template(template)
    missing = [name for name in page.get_identifiers() if name not in values]
    if missing:
        what = f"set {', '.join(missing)} in the environment; its head says what they are"
        raise errors.UserError(f"launch/gke.yaml: {what}")
    return page.substitute(values)


def apply_gke(runs: Sequence[SweepRun], workdir: epath.Path) -> str:
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
    state = ("--ignore-not-found", "-o=jsonpath={.status.terminalState}")
    for path, run, _ in pages:
        name = ("jobset", jobset_name(run))
        if _output("kubectl", "get", *name, *state) == "Failed":  # it is never started again
            _output("kubectl", "delete", *name)
        _output("kubectl", "apply", "-f", str(path))
    return f"applied {len(left)} JobSets of {folder}; --table shows how far they are"
