"""Generates the aviary data set: drawn birds of invented species, with annotations.

  grain-jax aviary --output DIR [--images N --seed S --size 64 --processes P ...]

With --records R, DIR/A.jsonl is also built into TFRecords in R (as `grain-jax build` does).
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath
from grain_jax.data import example, staging
from grain_jax.data.aviary import arguments, generate
from grain_jax.data.aviary.settings import Noise, Pose, Settings

from grain_jax import errors


def _group(kind: type, given: argparse.Namespace, **others: Any) -> Any:
    names = {field.name for field in dataclasses.fields(kind)} - set(others)
    return kind(**{name: getattr(given, name) for name in names}, **others)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    try:
        given = arguments.parser().parse_args(argv)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    settings = _group(Settings, given, pose=_group(Pose, given), noise=_group(Noise, given))
    try:
        made = generate.write(given.output, settings, processes=given.processes)
    except (ValueError, OSError) as error:
        print(f"grain-jax aviary: {error}", file=sys.stderr)
        return 2
    print(f"{given.output}: " + ("written" if made else "already complete"), file=sys.stderr)
    if not given.records:
        return 0
    target = epath.Path(given.records) / given.name / example.VERSION
    staging.recover(target)
    if not made and target.exists():  # exists only after a complete build
        return 0
    from grain_jax.data import build  # its imports take seconds

    return build.main(
        [
            f"--annotations={epath.Path(given.output) / 'A.jsonl'}",
            f"--images={given.output}",
            f"--output={given.records}",
            f"--name={given.name}",
            f"--workers={given.processes}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
