"""Generates the aviary dataset: drawn birds of invented species, with annotations.

grain-jax aviary --output DIR [--records R --images N --seed S --size 64 --processes P ...]
"""

import functools
import sys

from etils import epath

from grain_jax.cli import process
from grain_jax.data.arguments import Build
from grain_jax.data.aviary import generate
from grain_jax.data.aviary.arguments import Aviary
from grain_jax.input_pipeline import record_folders


def aviary(args: Aviary) -> str:
    """Writes the dataset, and its records if they are asked for; returns a line. Raises UserError."""
    made = generate.write(args.output, args.settings, processes=args.processes)
    records = args.records and epath.Path(args.records) / args.name / record_folders.VERSION
    if not records or (not made and records.exists()):  # it exists only after a complete build
        return f"{args.output}: " + ("written" if made else "already complete")
    from grain_jax.data import build  # its imports take seconds

    flags = dict(images=args.output, output=args.records, name=args.name, workers=args.processes)
    annotations = str(epath.Path(args.output) / "A.jsonl")
    # The build may find a set that another one, which was killed, had put aside.
    return build.build(Build(annotations=[annotations], overwrite=not made, **flags))


main = functools.partial(process.console, Aviary, aviary)


if __name__ == "__main__":
    sys.exit(main(None))
