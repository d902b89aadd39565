"""Generates the aviary dataset: drawn birds of invented species, with annotations.

  grain-jax aviary --output DIR [--images N --seed S --size 64 --processes P ...]

With --records R, DIR/A.jsonl is also built into TFRecords in R (as `grain-jax build` does).
"""

import sys
from collections.abc import Sequence

from etils import epath

from grain_jax.core import errors
from grain_jax.data import staging
from grain_jax.data.aviary import generate
from grain_jax.data.aviary.arguments import Aviary
from grain_jax.input_pipeline import text_lengths


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    try:
        args = Aviary.parse(argv)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    try:
        made = generate.write(args.output, args.settings, processes=args.processes)
        print(f"{args.output}: " + ("written" if made else "already complete"), file=sys.stderr)
        if not args.records or (not made and _is_built(args)):
            return 0
    except (ValueError, OSError) as error:
        print(f"grain-jax aviary: {error}", file=sys.stderr)
        return 2
    from grain_jax.data import build  # its imports take seconds

    return build.main(
        [
            f"--annotations={epath.Path(args.output) / 'A.jsonl'}",
            f"--images={args.output}",
            f"--output={args.records}",
            f"--name={args.name}",
            f"--workers={args.processes}",
        ]
    )


def _is_built(args: Aviary) -> bool:
    """Whether the records are there: the folder of a set exists only after a complete build."""
    target = epath.Path(args.records) / args.name / text_lengths.VERSION
    if not target.exists():
        with staging.locked(target):
            staging.recover(target)
    return target.exists()


if __name__ == "__main__":
    sys.exit(main())
