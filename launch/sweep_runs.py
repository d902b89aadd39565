"""The points of a sweep as runs: overrides, names, checked configs, and whether their folders fit them."""

import dataclasses
import json
import re
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.cli import config_file
from grain_jax.core import errors, regular_file
from grain_jax.input_pipeline import derived
from grain_jax.runtime import metrics_file

DEFINING = {"order", "numbers", "result"}  # roles of the keys that may not change between two calls
_LONGEST_NAME = 200  # characters; file systems end at 255


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One point of a sweep."""

    name: str
    swept: Mapping[str, Any]  # config key -> value, of the keys that differ between points
    config: config_lib.Config
    arguments: tuple[str, ...]  # of grain_jax.train
    folder: epath.Path

    @property
    def command(self) -> tuple[str, ...]:
        """The command that trains it."""
        return ("grain-jax", "train", *self.arguments)


def load_points(path: epath.PathLike) -> list[dict[str, Any]]:
    """The flat overrides that `sweep()` yields, of a file or of a sweep of the package.

    Raises:
      UserError: no such file, no such function, it fails, or it yields nothing or no dicts of leaves.
    """
    path, _ = config_file.find(str(path), "sweep")
    with config_file.running_file(path, "sweep"):
        sweep = runpy.run_path(path).get("sweep")
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


def _short(value: Any) -> str:
    """A value in the name of a run: as few digits as identify it, no characters that a path cannot have."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


def _differing(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that differ between points; all where none does."""
    keys = list(dict.fromkeys(key for point in points for key in point))
    return [k for k in keys if any(p.get(k) != points[0].get(k) for p in points)] or keys


def name_points(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A readable name for each point, e.g. `learning_rate=0.001,seed=1`: what differs between them.

    Raises:
      UserError: two points are the same, or a name is too long for a folder.
    """
    differ = _differing(points)
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
    file: str,
    overrides: Sequence[str],
    points: Sequence[Mapping[str, Any]],
    workdir: epath.Path,
) -> list[SweepRun]:
    """The runs of a sweep, each with its config, which is checked as the trainer will read it.

    Args:
      file: as `--config` takes it.
      overrides: `--config.KEY=VALUE` of this command line.
      points: as `load_points` gives them.
      workdir: of the sweep; holds the folders of the runs.

    Raises:
      UserError: a line for every fault of the points.
    """
    given = [word.partition("=")[0].removeprefix("--config.") for word in overrides]
    differ = _differing(points)
    known = config_lib.flatten(dataclasses.asdict(config_file.load(file, overrides)))
    runs: list[SweepRun] = []
    faults: dict[str, list[str]] = {}  # fault -> the points that have it
    for name, point in zip(name_points(points), points):
        words = (*overrides, *(f"--config.{key}={value}" for key, value in point.items()))
        found = []
        for key, value in point.items():
            if key in given:
                found.append(f"{key}: the sweep and the command line both set it; leave one out")
            inside = [name for name in known if name.startswith(f"{key}.")]
            if inside:
                found.append(f"{key}: is a group of keys; set them one by one, such as {inside[0]}")
            elif not isinstance(value, (bool, int, float, str, tuple, list)) and not (
                isinstance(value, dict) and config_file.is_weight(key)
            ):
                found.append(
                    f"{key}: got {value!r}, expected a number, a string, a bool, a tuple or a list"
                )
        try:
            if found:
                raise errors.UserError("\n".join(found))
            config = config_file.load(file, words)
        except errors.UserError as error:
            for line in str(error).splitlines():
                faults.setdefault(line, []).append(name)
            continue
        values = config_lib.flatten(dataclasses.asdict(config))
        values = {**point, **values}  # a key of a schedule is no key of its own
        swept = {key: values[key] for key in differ if key in values}
        swept = {k: str(v) if isinstance(v, dict) else v for k, v in swept.items()}
        arguments = (f"--config={file}", *words, f"--workdir={workdir / name}")
        runs.append(SweepRun(name, swept, config, arguments, workdir / name))
    if faults:
        others = lambda names: f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines = (f"{line} (in {names[0]}{others(names)})" for line, names in faults.items())
        raise errors.UserError("\n".join(lines))
    return runs


def check_folders(runs: Sequence[SweepRun]) -> None:
    """Raises UserError where the folder of a run has the results of another config."""
    faults = []
    for run in runs:
        file = run.folder / "config.json"
        if not file.exists():
            continue
        try:
            stored = json.loads(regular_file.read_text(file, "a config"))
        except json.JSONDecodeError:  # a kill cut it off; the trainer asks the checkpoint's own
            continue
        try:
            old = config_lib.select(config_lib.from_dict(stored), DEFINING)
        except errors.UserError as error:
            what = "is no config of this version; take another --workdir, or remove that folder"
            faults.append(f"{run.folder}: config.json {what} ({str(error).splitlines()[0]})")
            continue
        new = config_lib.select(run.config, DEFINING)
        for key in [key for key in new if key in old and old[key] != new[key]]:
            # What is said and done where data is missing makes no other run; what is not set, the trainer
            # derives, and config.json has the numbers.
            if key.startswith("evals.") and key.endswith((".get", ".missing")):
                continue
            if key in (*derived.KEYS, derived.LENGTHS) and new[key] is None:
                continue
            faults.append(
                f"{run.folder}: was trained with {key} = {old[key]!r}, now it is {new[key]!r}; take"
                " another --workdir, or remove that folder"
            )
    if faults:
        raise errors.UserError("\n".join(faults))


def last_step(folder: epath.Path) -> int:
    """The last step that a run has logged; 0 before the first."""
    lines, _ = metrics_file.read(metrics_file.files(folder))
    return lines[-1].step if lines else 0


def finished(run: SweepRun) -> bool:
    """Whether the last step is logged and saved, and the trainer has written its report."""
    if not (run.folder / "report.html").exists():
        return False
    from grain_jax.runtime import checkpoint  # JAX: seconds, and only for what may be finished

    step = last_step(run.folder)
    # Only the data set can turn a length in epochs into steps.
    return step in checkpoint.finished_steps(run.folder) and run.config.total_steps in (None, step)


def share_done(run: SweepRun) -> float:
    """The share of the steps that are done, 0 to 1; 0 where the length is not known."""
    if run.config.total_steps is None:
        return 0.0
    return last_step(run.folder) / run.config.total_steps


def local_folder(workdir: epath.Path) -> epath.Path:
    """The folder of the logs and job files of a sweep: its workdir, or a local folder where that is remote."""
    if "://" not in str(workdir):
        return workdir
    return epath.Path("runs/sweeps") / re.sub(r"\W+", "_", str(workdir).partition("://")[2])
