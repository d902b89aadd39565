"""The points of a sweep as runs: overrides, names, checked configs, and whether their folders fit them."""

import dataclasses
import re
import runpy
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.config import loading
from grain_jax.core import errors, metrics_file, regular_file
from grain_jax.evaluate import kinds
from grain_jax.input_pipeline import derived

DEFINING = {"order", "numbers", "result"}  # roles of the keys that may not change between two calls


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One point of a sweep."""

    name: str
    swept: Mapping[str, Any]  # config key -> value, of the keys that differ between points
    config: config_lib.Config
    arguments: tuple[str, ...]  # of grain_jax.train
    folder: epath.Path


def load_points(path: epath.PathLike) -> list[dict[str, Any]]:
    """The flat overrides that `sweep()` of a file, or of a sweep of the package, yields. Raises UserError."""
    path, _ = loading.find(str(path), "sweep")
    with loading.running_file(path, "sweep"):
        points = list(runpy.run_path(path).get("sweep", list)())
    if not points or not all(isinstance(point, Mapping) for point in points):
        raise errors.UserError(
            f"--sweep: {path}: got {points[:3]}, expected a function sweep() that yields dicts such as"
            " {'optim.learning_rate': 1e-3}"
        )
    return [dict(point) for point in points]


def short(value: Any) -> str:
    """A value for the name of a run: the fewest digits that identify it, in characters of a path."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


def _differing(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that differ between points; all keys if none differs."""
    keys = list(dict.fromkeys(key for point in points for key in point))
    return [k for k in keys if any(p.get(k) != points[0].get(k) for p in points)] or keys


def labels(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole key if others end with it."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return {key: key if leaves.count(leaf) > 1 else leaf for key, leaf in zip(keys, leaves)}


def name_points(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A readable name for each point, e.g. `learning_rate=0.001,seed=1`: what differs between them.

    Raises:
      UserError: two points are the same.
    """
    label = labels(_differing(points))
    names: list[str] = []
    for number, point in enumerate(points, 1):
        parts = [f"{label[key]}={short(point[key])}" for key in label if key in point]
        name = ",".join(parts) or "base"
        if name in names:
            first = names.index(name) + 1
            raise errors.UserError(
                f"--sweep: points {first} and {number} are both {name}; expected each once"
            )
        names.append(name)
    return names


def make_runs(
    file: str, overrides: Sequence[str], points: Sequence[Mapping[str, Any]], workdir: epath.Path
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
    set_here = {word.partition("=")[0].removeprefix("--config.") for word in overrides}
    differ, runs = _differing(points), []
    faults: dict[str, str] = {}  # fault -> the first point that has it
    for name, point in zip(name_points(points), points):
        flags = (*overrides, *(f"--config.{key}={value}" for key, value in point.items()))
        try:
            for key in set_here & {*point}:
                raise errors.UserError(f"{key}: the sweep and the command line both set it; leave one out")
            config = loading.load(file, flags)
            kinds.from_entries(config.evals, config.model)
        except errors.UserError as error:
            for line in str(error).splitlines():
                faults.setdefault(line, name)
            continue
        values = config_lib.flatten(dataclasses.asdict(config))
        swept = {key: values[key] for key in differ if key in values}
        arguments = (f"--config={file}", *flags, f"--workdir={workdir / name}")
        runs.append(SweepRun(name, swept, config, arguments, workdir / name))
    if faults:
        raise errors.UserError("\n".join(f"{line} (in {name})" for line, name in faults.items()))
    return runs


def check_folders(runs: Sequence[SweepRun]) -> None:
    """Raises UserError if the folder of a run has results of another config."""
    faults = []
    for run in runs:
        file = run.folder / "config.json"
        if not file.exists():
            continue
        try:
            stored = regular_file.read_json(file, dict[str, Any], "the config of a run")
            old = config_lib.select(config_lib.from_dict(stored), DEFINING)
        except errors.UserError as error:
            reason = " ".join(str(error).removeprefix(f"{file}: ").split())
            faults.append(f"{file}: damaged ({reason}); put back a copy, or remove that folder")
            continue
        for key, value in config_lib.select(run.config, DEFINING).items():
            # What happens without data makes no other run. The trainer derives numbers that are not set, and
            # config.json has them.
            same = key.startswith("evals.") and key.endswith((".get", ".missing"))
            same |= key in derived.KEYS and value is None
            if not same and key in old and old[key] != value:
                faults.append(
                    f"{run.folder}: was trained with {key} = {old[key]!r}, and is {value!r} here; take"
                    " another --workdir, or remove that folder"
                )
    if faults:
        raise errors.UserError("\n".join(faults))


def finished(run: SweepRun) -> bool:
    """Whether the last step is logged and saved, and the trainer has written its report."""
    if not (run.folder / "report.html").exists():
        return False
    from grain_jax.checkpoint import files

    lines = metrics_file.read(run.folder)
    step = lines[-1].step if lines else 0
    # Only the dataset can turn a length in epochs into steps.
    return step in files.finished_steps(run.folder) and run.config.total_steps in (None, step)


def makes_dataset(run: SweepRun) -> list[str]:
    """The words after `python -m` that make the missing dataset of a run (`input.prepare`); else []."""
    data = run.config.input
    there = data.source != "records" or (epath.Path(data.data_dir) / data.name).exists()
    return [] if there else [w.format(**vars(data)) for w in shlex.split(data.prepare or "")]


def local_folder(workdir: epath.Path) -> epath.Path:
    """The folder of the logs and job files of a sweep: its workdir, or a local one for a remote workdir."""
    if "://" not in str(workdir):
        return workdir
    return epath.Path("runs/sweeps") / re.sub(r"\W+", "_", str(workdir).partition("://")[2])
