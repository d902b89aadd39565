"""The files that run the unfinished points of a sweep on a cluster: a SLURM array, or a JobSet per run."""

import hashlib
import os
import re
import shlex
import string
from collections.abc import Sequence

from etils import epath

from grain_jax.core import atomic, errors
from grain_jax.launch.sweep_runs import SweepRun, finished, local_folder, makes_dataset

HERE = epath.Path(__file__).parent


def _check(runs: Sequence[SweepRun]) -> None:
    for run in runs:
        if bad := [argument for argument in run.arguments if shlex.quote(argument) != argument]:
            raise errors.UserError(
                f"{run.name}: got {bad[0]!r}, expected arguments without blanks, quotes and brackets,"
                " which clusters take apart"
            )
        if command := makes_dataset(run):
            raise errors.UserError(
                f"{run.name}: no dataset yet, and every run would make it (input.prepare); make it first:"
                f" python -m {shlex.join(command)}"
            )


def jobset_name(run: SweepRun) -> str:
    """A name that Kubernetes takes, always the same for the same folder."""
    word = re.sub(r"[^a-z0-9]+", "-", run.folder.parent.name.lower()).strip("-")[:20].strip("-")
    return f"{word or 'sweep'}-{hashlib.sha256(str(run.folder).encode()).hexdigest()[:8]}"


def render(run: SweepRun, template: str) -> str:
    """A JobSet for one run: ${NAME} and ${ARGS} are the run's, the rest comes from the environment.

    Raises:
      UserError: a variable of the template that is not set.
    """
    values = {**os.environ, "NAME": jobset_name(run), "ARGS": " ".join(run.arguments)}
    filled = string.Template(template)
    if missing := [name for name in filled.get_identifiers() if name not in values]:
        raise errors.UserError(
            f"the JobSet: set {', '.join(missing)} in the environment; the head of its file (grain-jax"
            " launch-files) says what they are"
        )
    return filled.safe_substitute(values)  # $(NAME) is for Kubernetes


def write(launcher: str, runs: Sequence[SweepRun], workdir: epath.Path, parallel: int | None) -> str:
    """Writes the file of the unfinished runs; returns the command that submits it.

    Args:
      launcher: "slurm" (a line of arguments per task of an array), "gke" or "gke-gpu" (a JobSet per run).
      parallel: tasks of an array that run at a time; None: all.
    """
    left = [run for run in runs if not finished(run)]
    _check(left)
    if not left:
        raise errors.UserError("all runs are finished; --table shows them")
    folder = local_folder(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    if launcher == "slurm":
        path = folder / "slurm.txt"
        atomic.write_text(path, "".join(" ".join(run.arguments) + "\n" for run in left))
        array = f"--array=1-{len(left)}" + (f"%{parallel}" if parallel else "")
        script = str(HERE / "slurm.sbatch")
        return shlex.join([f"GRAIN_ARGS_FILE={path.resolve()}", "sbatch", array, script])
    path = folder / f"{launcher.replace('-', '_')}.yaml"
    template = re.sub(r"^#.*\n", "", (HERE / path.name).read_text(), flags=re.MULTILINE)
    atomic.write_text(path, "---\n".join(render(run, template) for run in left))
    return shlex.join(["kubectl", "apply", "-f", str(path)])
