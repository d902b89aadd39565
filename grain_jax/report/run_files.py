"""Reads the files of a workdir: curves, results, config, environment. Needs no model."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from grain_jax.core import errors, regular_file
from grain_jax.evaluate import tables
from grain_jax.runtime import metrics_file

_POINTS = 800  # points of a curve that the page keeps, at most
# JSON files that are no results of an evaluation.
_OWN = ("config.json", "results.json", "report_data.json")
_BY_NAME = "by_name/"  # prefix of the numbers without descriptions, by class names alone


class InputError(errors.UserError):
    """A folder or file that holds nothing to report; the message is one line."""


class Result(NamedTuple):
    """One evaluation of a run."""

    name: str
    kind: str  # of its evaluator; "" where the files do not say
    source: str  # name of the file
    numbers: dict[str, float]  # as `evaluate.tables.scalars` returns them
    per_class: dict[str, dict[str, float]]  # alpha -> class -> accuracy
    counts: dict[str, int]  # class -> number of its images, if known


class RunFiles(NamedTuple):
    """The content of the files of a workdir."""

    workdir: epath.Path
    step: int | None  # the last logged step
    config: dict[str, Any] | None
    series: dict[str, tuple[list[float], list[float]]]  # key -> steps, values
    results: list[Result]
    environment: dict[str, str]  # name -> text: command and machine
    unmeasured: list[str]  # a line for each thing that is missing


def read(workdir: epath.PathLike, results: Sequence[epath.PathLike] = ()) -> RunFiles:
    """Reads the files of a run; each that is missing becomes a line of `unmeasured`.

    Args:
      workdir: workdir of a run.
      results: files that `grain_jax.evaluate` wrote, in addition to those in the workdir.

    Raises:
      InputError: there is no such folder, it holds no run, or one of `results` cannot be read.
    """
    workdir = epath.Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"{workdir}: no such folder; expected the workdir of a run")
    config = _json(workdir / "config.json")
    lines, faults = metrics_file.read(metrics_file.files(workdir))
    if config is None and not lines:
        raise InputError(
            f"{workdir}: has neither config.json nor metrics.jsonl; expected the workdir of a run"
        )
    unmeasured = faults
    evals = (config or {}).get("evals", {})
    if not (isinstance(evals, dict) and all(isinstance(x, dict) for x in evals.values())):
        unmeasured.append(f"config.json: evals: got {str(evals)[:40]!r}, expected named entries")
        config, evals = {**(config or {}), "evals": {}}, {}
    if not lines:
        unmeasured.append(f"{metrics_file.FILE}: missing or empty, so there are no curves")
    series = metrics_file.series(lines)
    step = lines[-1].step if lines else None
    found = _training_results(workdir, series, evals)
    if not found:
        unmeasured.append(
            "the run has not evaluated yet (no results.json, no eval/... in its metrics)"
        )
    given = [epath.Path(file) for file in results]
    for file in given:
        if _json(file) is None:
            raise InputError(
                f"{file}: cannot be read, expected the results of an evaluation (JSON)"
            )
    for file in [*sorted(workdir.glob("*.json")), *given]:
        if file.name not in _OWN:
            _evaluations(file, found, unmeasured)
    names = {result.name for result in found}
    for name in evals:
        if found and name not in names:
            unmeasured.append(f"{name}: an entry of config.evals without a result")
    return RunFiles(workdir, step, config, series, found, _environment(workdir), unmeasured)


def labels(workdirs: Sequence[epath.PathLike]) -> list[str]:
    """A short label for each folder: its name, with as many parent folders as make the labels different."""
    parts = [epath.Path(w).parts for w in workdirs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p)} ({i})" for i, p in enumerate(parts, 1)]


def by_evaluation(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of `eval/NAME/KEY` as {NAME: {KEY: number}}; other values are left out."""
    groups: dict[str, dict[str, float]] = {}
    for key, value in results.items():
        name, _, rest = key.removeprefix("eval/").partition("/")
        if isinstance(value, (int, float)):
            groups.setdefault(name, {})[rest] = value
    return groups


def _json(path: epath.Path) -> dict[str, Any] | None:
    try:
        value = json.loads(regular_file.read_text(path, "JSON", 1 << 30))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most _POINTS evenly spaced points of a curve, the last one included; values have five digits."""
    every = -(-len(steps) // _POINTS)
    first = (len(steps) - 1) % every
    return list(steps[first::every]), [float(f"{v:.5g}") for v in values[first::every]]


def _training_results(
    workdir: epath.Path, series: Mapping[str, Any], evals: Mapping[str, Mapping[str, Any]]
) -> list[Result]:
    stored = _json(workdir / "results.json")
    source = "results.json"
    if stored is None:
        source = "metrics.jsonl"
        stored = {key: s[1][-1] for key, s in series.items() if key.startswith("eval/")}
    kinds = {name: str(entry.get("kind", "")) for name, entry in evals.items()}
    groups = by_evaluation(stored).items()
    return [
        result
        for name, numbers in groups
        for result in _results(name, kinds.get(name, ""), source, numbers)
    ]


def _evaluations(file: epath.Path, found: list[Result], unmeasured: list[str]) -> None:
    """Adds to `found` the results in a file of `grain_jax.evaluate`: those of a suite or of one evaluation."""
    value = _json(file)
    if value is None:
        unmeasured.append(f"{file}: cannot be read as the results of an evaluation (JSON)")
        return
    if isinstance(value.get("ran"), dict):
        for name, result in value["ran"].items():
            found += _of_file(name, file, result)
        for what in ("skipped", "failed", "notes"):
            lines = value.get(what) or {}
            unmeasured += [f"{name} ({file.name}): {what}: {line}" for name, line in lines.items()]
    elif "kind" in value:
        found += _of_file(file.stem, file, value)


def _results(name: str, kind: str, source: str, numbers: Mapping[str, float]) -> list[Result]:
    """The result of an evaluation; then, if it has one, the result by class names alone."""
    out = []
    alone = {k: v for k, v in numbers.items() if k.startswith(_BY_NAME)}
    own = {k: v for k, v in numbers.items() if k not in alone}
    out.append(Result(name, kind, source, own, {}, {}))
    if alone:
        shared = {k: own[k] for k in ("chance", "chance_top5", "pictures") if k in own}
        alone = {k.removeprefix(_BY_NAME): v for k, v in alone.items()}
        out.append(Result(f"{name}, by name", kind, source, shared | alone, {}, {}))
    return out


def _of_file(name: str, file: epath.Path, value: Mapping[str, Any]) -> list[Result]:
    """The results in the JSON that `grain_jax.evaluate` wrote for one evaluation."""
    beside = ("entry", "inputs", "seconds", "per_class", "pictures_per_class")  # no results
    numbers = tables.scalars({key: part for key, part in value.items() if key not in beside})
    parts = [value, value.get(_BY_NAME.removesuffix("/"), {})]
    return [
        result._replace(
            per_class={
                f"{float(key.removeprefix('alpha_')):g}": alpha["per_class"]
                for key, alpha in part.items()
                if key.startswith("alpha_") and isinstance(alpha, Mapping) and "per_class" in alpha
            },
            counts=value.get("pictures_per_class", {}),
        )
        for result, part in zip(
            _results(name, str(value.get("kind", "")), file.name, numbers), parts
        )
    ]


def _environment(workdir: epath.Path) -> dict[str, str]:
    out = {"workdir": str(workdir)}
    log = workdir / "log.txt"
    if regular_file.is_one(log):
        lines = regular_file.read(log, 1 << 30, "a log").decode(errors="replace").splitlines()
        commands = [line[2:] for line in lines if line.startswith("$ ")]
        if commands:
            out["command"] = commands[-1]
            out["times started"] = str(len(commands))
        devices = [line for line in lines if " device(s), mesh " in line]
        if devices:
            out["devices and model"] = devices[-1]
    return out
