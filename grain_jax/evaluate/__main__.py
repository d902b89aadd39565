"""`grain-jax evaluate KIND --checkpoint DIR ... --output OUT.json`: an evaluator, or a suite of them.

Prints the result as a table and writes it as JSON. Wrong usage or input: a line a fault, status 2. Several
processes (grain-jax local, SLURM, TPU slices) share the images; the first one prints and writes.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from grain_jax import inference
from grain_jax.checkpoint import saved_model
from grain_jax.core import annotations, atomic, errors
from grain_jax.evaluate import encode, kinds, suite, tables
from grain_jax.evaluate.arguments import Evaluate
from grain_jax.evaluate.base import Context
from grain_jax.inference.inputs import InputError
from grain_jax.runtime import distributed, processes


def _output(path: str, name: str = "--output") -> epath.Path:
    output = epath.Path(path)
    if output.is_dir():
        raise InputError(f"{name}: {output} is a folder, expected a file to write")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic.check(output)
    except OSError as error:
        raise InputError(f"{name}: {output}: {error.strerror or error}") from None
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one evaluation, or a suite; returns the exit status: 0, or 2 with a line a fault on stderr.

    Of a suite, 1 where one of its entries failed, and 2 where there was nothing that could be run.
    """
    try:
        args = Evaluate.parse(arguments)
        if args.command == "suite":  # ml_collections, which the other kinds do without
            from grain_jax.config import loading

            args.suite = loading.load(args.config, args.overrides, kinds.suite_from_dict)
        distributed.keep_compiled_programs()
        distributed.initialize(
            args.coordinator, args.processes, args.process_id, args.heartbeat_seconds
        )
        with (
            distributed.ending_together(args.heartbeat_seconds),
            errors.out_of_memory_in_a_line("evaluation", lambda: encode.SMALLER),
        ):
            if args.command != "suite":
                return _one(args)
            return suite.run(
                args.suite,
                _ready(args)[0],
                checkpoint=args.checkpoint,
                load=lambda: _load(args),
                only=None if args.only is None else args.only.split(","),
                again=args.again,
                batch_size=args.batch_size,
            )
    except errors.UserError as error:
        if processes.process_info()[0] == 0:
            faults = str(error).split("\n")
            # Annotations have a summary of their own.
            if len(faults) > 1 and not isinstance(error.__cause__, annotations.AnnotationError):
                faults.append(f"{len(faults)} faults; nothing was evaluated")
            print(*faults, sep="\n", file=sys.stderr)
        return errors.UserError.status


def _ready(args: argparse.Namespace, entry_of: Callable[[], Any] = lambda: None) -> Any:
    """The file to write and the entry, once the checkpoint is known to be there."""
    found = processes.run_together(lambda: (_output(args.output), entry_of()))
    processes.run_together(lambda: saved_model.find(args.checkpoint))
    return found


def _load(args: argparse.Namespace):
    return inference.load(args.checkpoint)


def _one(args: argparse.Namespace) -> int:
    cls = kinds.find(args.command.replace("-", "_"))
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(cls)}
    entry_of = lambda: cls.of_flags(**{key: x for key, x in given.items() if x is not None})
    wanted, predictions = getattr(args, "predictions", None), None
    if wanted:
        predictions = processes.run_together(lambda: _output(wanted, "--predictions"))
    output, entry = _ready(args, entry_of)
    processes.run_together(entry.check)  # before the checkpoint is read
    predictor = processes.run_together(lambda: _load(args))
    began = time.monotonic()
    result = entry.evaluate(predictor, Context(args.batch_size, predictions=predictions))
    result |= {"kind": entry.kind, "seconds": round(time.monotonic() - began, 1)}
    if processes.process_info()[0]:
        return 0
    print(tables.describe({args.command: (entry.kind, tables.scalars(result))}), flush=True)
    for reason in result.get("unreadable_pictures", ()):
        print(f"left out: {reason}", file=sys.stderr)
    result |= entry.on_top(result)
    told = ("checkpoint", "images", "train", "annotations")
    result = {key: getattr(args, key) for key in told if key in args} | result
    try:
        atomic.write_text(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:  # the numbers have been printed
        print(f"--output: {output}: {error.strerror or error}; nothing was saved", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
