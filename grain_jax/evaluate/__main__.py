"""`grain-jax evaluate KIND --checkpoint DIR ... --output OUT.json`: an evaluator, or a suite of them.

Prints the result as a table and writes it as JSON; of several processes the first one does.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence

from etils import epath

from grain_jax import inference
from grain_jax.checkpoint import saved_model
from grain_jax.core import atomic, errors
from grain_jax.evaluate import encode, kinds, suite, tables
from grain_jax.evaluate.arguments import Evaluate
from grain_jax.inference.inputs import InputError
from grain_jax.runtime import distributed, processes


def _output(path: str) -> epath.Path:
    output = epath.Path(path)
    if output.is_dir():
        raise InputError(f"--output: {output} is a folder, expected a file to write")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic.check(output)
    except OSError as error:
        raise InputError(f"--output: {output}: {error.strerror or error}") from None
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one evaluation, or a suite; returns `suite.run`'s status, or 0, or 2 with lines on stderr."""
    try:
        args = Evaluate.parse(arguments)
        entries = {}
        if args.command == "suite":  # ml_collections, which the other kinds do without
            from grain_jax.config import loading

            entries = loading.load(args.config, args.overrides, kinds.suite_from_dict)
        distributed.keep_compiled_programs()
        distributed.initialize(args.coordinator, args.processes, args.process_id, args.heartbeat_seconds)
        with (
            distributed.ending_together(args.heartbeat_seconds),
            errors.out_of_memory_in_a_line("evaluation", lambda: encode.SMALLER),
        ):
            if args.command != "suite":
                return _run_one(args)
            output = processes.run_together(lambda: _output(args.output))
            processes.run_together(lambda: saved_model.find(args.checkpoint))
            return suite.run(
                entries,
                output,
                checkpoint=args.checkpoint,
                load=lambda: inference.load(args.checkpoint),
                only=None if args.only is None else args.only.split(","),
                again=args.again,
                batch_size=args.batch_size,
            )
    except errors.UserError as error:
        if processes.process_info()[0] == 0:
            print(error, file=sys.stderr)
        return errors.UserError.status


def _run_one(args: argparse.Namespace) -> int:
    cls = kinds.find(args.command.replace("-", "_"))
    names = [field.name for field in dataclasses.fields(cls)]
    flags = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}

    def check():  # everything, before the checkpoint is read
        file, entry = _output(args.output), cls(**flags)
        saved_model.find(args.checkpoint)
        entry.check()
        return file, entry

    output, entry = processes.run_together(check)
    predictor = processes.run_together(lambda: inference.load(args.checkpoint))
    began = time.monotonic()
    result = entry.evaluate(predictor)
    result |= {"kind": entry.kind, "seconds": round(time.monotonic() - began, 1)}
    if processes.process_info()[0]:
        return 0
    print(tables.describe({args.command: (entry.kind, tables.scalars(result))}), flush=True)
    for line in (*result.get("notes", ()), entry.finish(predictor, result)):
        print(line, end="\n" if line else "", flush=True)
    for reason in result.get("unreadable_images", ()):
        print(f"left out: {reason}", file=sys.stderr)
    inputs = {x: getattr(args, x) for x in ("checkpoint", "train", "annotations") if x in args}
    result = {**inputs, "folder": getattr(args, "images", None), **result}
    return 0 if suite.save(output, json.dumps(result, indent=2, ensure_ascii=False)) else 2


if __name__ == "__main__":
    sys.exit(main())
