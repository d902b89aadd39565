"""The evaluators of a run that have their data (`present`), and a suite of them on one checkpoint (`run`).

In a suite, one that fails stops no other. Results are written after every entry. The same command, run again,
measures only the entries without a result.
"""

import contextlib
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from grain_jax import config as config_lib
from grain_jax.core import atomic, errors, regular_file
from grain_jax.evaluate import tables
from grain_jax.evaluate.base import Evaluator, expanduser, how_to_get
from grain_jax.inference.inputs import InputError
from grain_jax.runtime import processes

FAILED, NOTHING = 1, 2  # exit statuses


def run(
    suite: Mapping[str, Evaluator],
    output: epath.Path,
    *,
    checkpoint: str,
    load: Callable[[], Any],
    only: Sequence[str] | None = None,
    again: bool = False,
    batch_size: int | None = None,
) -> int:
    """Runs the entries of a suite, or those of `only`, and writes `output`. Every process has to call it.

    Results of the same checkpoint that the file holds stay, and without `again` are not measured again.
    `checkpoint` is its name there, and `load` returns its predictor.

    Returns: the exit status: FAILED if an entry failed, NOTHING if no entry could run, else 0.
    Raises: InputError: `only` has an unknown name, or `output` holds something else, or another checkpoint's.
    """
    for name in only or ():
        if name not in suite:
            message = config_lib.unknown_key(name, list(suite))
            raise InputError(f"--only: {name}: {message.replace('key', 'entry')}")
    entries = {n: entry for n, entry in suite.items() if only is None or n in only}
    before = processes.run_together(lambda: _read(output, again))
    results: dict[str, Any] = {"ran": {}, "skipped": {}, "failed": {}, "notes": {}}
    tasks = _tasks(entries, results)
    if not tasks:
        _say("nothing could be run")
        return FAILED if results["failed"] else NOTHING

    predictor = processes.run_together(load)
    number_of_processes = processes.process_info()[1]
    about = {"checkpoint": checkpoint, "folder": str(predictor.folder or checkpoint)}
    results = about | {"digest": predictor.digests, "processes": number_of_processes} | results
    if before and before.get("digest") == results["digest"]:
        stays = lambda n, result: n in tasks and not again and _is_same(result, *tasks[n])
        results["ran"] = {n: x for n, x in before["ran"].items() if n not in entries or stays(n, x)}
    elif before and not again:
        holds = f"the results of another checkpoint ({before.get('folder')}, now {results['folder']})"
        advice = "expected another file, or --again to start over"
        raise InputError(f"--output: {output}: holds {holds}; {advice}")
    for number, (name, (entry, inputs)) in enumerate(tasks.items(), 1):
        title = f"{name} ({number} of {len(tasks)})"
        if name in results["ran"]:
            _say(f"{title}: is in {output} already")
            continue
        began = time.monotonic()
        try:
            result = dataclasses.replace(entry, batch_size=batch_size or entry.batch_size).evaluate(predictor)
        except Exception as error:
            if not isinstance(error, errors.UserError) and number_of_processes > 1:
                raise  # another process may wait for this one in a collective operation
            _failed(name, error, results)
        else:
            seconds = round(time.monotonic() - began, 1)
            about = {"entry": dataclasses.asdict(entry), "inputs": inputs, "seconds": seconds}
            results["ran"][name] = about | result | {"kind": entry.kind}
            _say(f"{title}: {inputs['images']} images in {seconds:.0f} s")
        _write(output, results, list(suite))
    saved = _write(output, results, list(suite))
    if processes.process_info()[0] == 0:
        _show(results)
    return FAILED if results["failed"] or not saved else 0


def present(entries: Mapping[str, Evaluator], model: config_lib.Model | None = None) -> dict[str, Evaluator]:
    """The entries whose data is there, checked; the same on every process. A skipped one is a line on stderr.

    `model` is the one that they will measure, if it is known. Raises errors.UserError, whose lines name the
    entry, if one cannot be used, or its data is missing and may not be.
    """
    ready = {}
    for name, entry in entries.items():
        try:
            images, line = _ready(entry, model)
        except errors.UserError as error:
            lines = str(error).split("\n")
            raise errors.UserError("\n".join(f"evals.{name}: {x}" for x in lines)) from error
        if line:
            _say(f"evals.{name}: {line}")
        if images is not None:
            ready[name] = entry
    return ready


def _ready(entry: Evaluator, model: config_lib.Model | None = None) -> tuple[int | None, str]:
    """Checks an entry: how many images it has, None if it is skipped, and a line if it lacks something."""

    def check() -> tuple[int, str]:
        named = [expanduser(path) for path in entry.data if path]
        if entry.missing == "skip" and entry.data:
            if not named:
                raise errors.MissingData("no images are named" + (f"; {entry.get}" if entry.get else ""))
            if absent := [path for path in named if not epath.Path(path).exists()]:
                raise errors.MissingData(f"{', '.join(absent)}: not there{how_to_get(entry.get)}")
        return entry.check(model), entry.note

    try:
        return processes.run_together(check)
    except errors.MissingData as error:
        if entry.missing != "skip":
            raise
        return None, f"skipped: {_words(error)}"


def _tasks(entries: Mapping[str, Evaluator], results: dict[str, Any]) -> dict[str, tuple[Evaluator, dict]]:
    """The entries that can be run, and their inputs; `results` gets a line for each of the others."""
    tasks = {}
    for name, entry in entries.items():
        try:
            images, line = _ready(entry)
        except Exception as error:
            _failed(name, error, results)
            continue
        if line:
            which = "notes" if images is not None else "skipped"
            results[which][name] = line.removeprefix("skipped: ")
            _say(f"{name}: {line}")
        if images is not None:
            texts = {x for x in entry.files if isinstance(x, str)} - {entry.get}
            files = [(x, epath.Path(expanduser(x))) for x in sorted(texts)]
            digests = {x: atomic.digest(f.read_bytes())[:16] for x, f in files if regular_file.is_one(f)}
            tasks[name] = entry, {"images": images, **digests}
    return tasks


def _failed(name: str, error: Exception, results: dict[str, Any]) -> None:
    if not isinstance(error, errors.UserError) and not errors.is_out_of_memory(error):
        traceback.print_exception(error)
    results["failed"][name] = _words(error)
    _say(f"{name}: failed: {_words(error)}")


def _read(output: epath.Path, again: bool) -> dict[str, Any] | None:
    """The results of an earlier run; None if there are none."""
    if not regular_file.is_one(output):
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        value = json.loads(output.read_text())
        if isinstance(value["ran"], dict) and "digest" in value:
            return value
    if again:
        return None
    holds = "something else than a suite's results"
    raise InputError(f"--output: {output}: holds {holds}; expected another file, or --again to replace it")


def _is_same(result: Mapping[str, Any], entry: Evaluator, inputs: dict[str, Any]) -> bool:
    """Whether an earlier result has the options and the inputs."""
    wanted = json.loads(json.dumps({"entry": dataclasses.asdict(entry), "inputs": inputs}))
    return wanted == {key: result.get(key) for key in wanted}


def _write(output: epath.Path, results: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether the file could be written, by the first process, with results in the order of `names`."""
    if processes.process_info()[0]:
        return True
    ran = results["ran"]
    ran = results["ran"] = {name: ran[name] for name in dict.fromkeys([*names, *ran]) if name in ran}
    seconds = sum(result["seconds"] for result in ran.values())
    results |= {"seconds": round(seconds, 1), "averages": tables.averages(ran)}
    return save(output, json.dumps(results, indent=1, ensure_ascii=False))


def save(output: epath.Path, text: str) -> bool:
    """Writes the results, or says on stderr that they could not be saved; they are still printed."""
    try:
        atomic.write_text(output, text + "\n")
    except OSError as error:
        _say(f"--output: {output}: {error.strerror or error}; nothing was saved")
        return False
    return True


def _show(results: Mapping[str, Any]) -> None:
    """Prints the tables, then the notes and the failed and skipped entries."""
    ran = results["ran"].items()
    others = {n: (r["kind"], tables.scalars(r)) for n, r in ran if r["kind"] != "zeroshot"}
    if len(others) < len(results["ran"]):
        print(tables.suite(results["ran"], results["averages"]))
    if others:
        print(tables.describe(others))
    for kind in ("notes", "failed"):
        for name, line in results[kind].items():
            print(f"{kind.removesuffix('s')}: {name}: {line}")
    if results["skipped"]:  # the reasons are printed already
        print(f"skipped, data missing: {', '.join(results['skipped'])}")
    sys.stdout.flush()


def _words(error: Exception) -> str:
    """An error as one line."""
    kind = "" if isinstance(error, errors.UserError) else f"{type(error).__name__}: "
    return kind + "; ".join(str(error).strip().split("\n"))


def _say(line: str) -> None:
    if processes.process_info()[0] == 0:
        print(line, file=sys.stderr, flush=True)
