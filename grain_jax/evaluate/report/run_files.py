"""Reads the files of a workdir: curves, results, config. Needs no model."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from grain_jax.core import errors, metrics_file
from grain_jax.evaluate import tables

_OTHERS = ("config.json", "results.json")  # JSON files that are no results of an evaluation


class Result(NamedTuple):
    """One evaluation of a run."""

    name: str
    kind: str  # of its evaluator; "" where the files do not say
    source: str  # name of the file
    numbers: dict[str, float]  # as `tables.scalars` returns them
    per_class: dict[str, dict[str, float]]  # "alpha 0.5" -> class -> accuracy


class RunFiles(NamedTuple):
    """The content of the files of a workdir."""

    workdir: epath.Path
    step: int | None  # the last logged step
    config: dict[str, Any] | None
    series: dict[str, tuple[list[float], list[float]]]  # key -> steps, values
    results: list[Result]
    unmeasured: list[str]  # a line for each thing that is missing


def read(workdir: epath.PathLike, results: Sequence[epath.PathLike] = ()) -> RunFiles:
    """Reads the files of a run, NAME.json of evaluations in it, and `results` of evaluations anywhere.

    What is missing is a line of `unmeasured`. Raises errors.UserError: there is no such folder, or it holds
    no run; or one of `results` is not there, or is not the result of an evaluation.
    """
    workdir = epath.Path(workdir)
    if not workdir.is_dir():
        raise errors.UserError(f"{workdir}: no such folder; expected the workdir of a run")
    unmeasured: list[str] = []
    config, lines = _json(workdir / "config.json", unmeasured), metrics_file.read(workdir)
    if config is None and not lines:
        raise errors.UserError(f"{workdir}: has neither config.json nor metrics.jsonl; expected a workdir")
    evals = (config or {}).get("evals", {})
    if not lines:
        unmeasured.append(f"{metrics_file.FILE}: missing or empty, so there are no curves")
    series = metrics_file.series(lines)
    source, stored = "results.json", _json(workdir / "results.json", unmeasured)
    if stored is None:
        last = {key: values[-1] for key, (_, values) in series.items()}
        source, stored = metrics_file.FILE, {key: x for key, x in last.items() if key.startswith("eval/")}
    kinds = {name: entry.get("kind", "") for name, entry in evals.items()}
    numbers = tables.by_evaluation(stored).items()
    measured = [Result(name, kinds.get(name, ""), source, each, {}) for name, each in numbers]
    if not measured:
        unmeasured.append("the run has not evaluated yet")
    given = [*map(epath.Path, results)]
    for file in [*sorted(set(workdir.glob("*.json")) - {*given}), *given]:
        value = None if file.name in _OTHERS else _json(file, unmeasured)
        if file in given and not (value and ("kind" in value or "ran" in value)):
            raise errors.UserError(f"{file}: expected a file that grain-jax evaluate --output wrote")
        if value and isinstance(value.get("ran"), dict):  # of a suite
            measured += [_of_file(name, file, result) for name, result in value["ran"].items()]
            for outcome in ("skipped", "failed", "notes"):
                of_outcome = (value.get(outcome) or {}).items()
                unmeasured += [f"{name} ({file.name}): {outcome}: {line}" for name, line in of_outcome]
        elif value and "kind" in value:
            measured.append(_of_file(file.stem, file, value))
    names = {result.name for result in measured}
    unmeasured += [f"{n}: in config.evals, without a result" for n in evals if n not in names]
    step = lines[-1].step if lines else None
    return RunFiles(workdir, step, config, series, measured, unmeasured)


def _json(path: epath.Path, unmeasured: list[str]) -> dict[str, Any] | None:
    """The JSON object in a file; None without one. A damaged one: a line on stderr and in `unmeasured`."""
    fault: object = "no JSON object"
    try:
        if isinstance(value := json.loads(path.read_text()), dict):
            return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        fault = error
    unmeasured.append(f"{path}: damaged ({fault}), expected what a run or an evaluation wrote")
    print(unmeasured[-1], file=sys.stderr)
    return None


def _of_file(name: str, file: epath.Path, value: Mapping[str, Any]) -> Result:
    """The result in the JSON that `grain_jax.evaluate` wrote for one evaluation."""
    beside = ("entry", "inputs", "seconds")
    numbers = tables.scalars({key: part for key, part in value.items() if key not in beside})
    per_class = {
        key.replace("_", " "): part["per_class"]
        for key, part in value.items()
        if isinstance(part, Mapping) and isinstance(part.get("per_class"), Mapping)
    }
    return Result(name, str(value.get("kind", "")), file.name, numbers, per_class)
