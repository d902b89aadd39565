"""Makes data sets of the pictures in Debian packages: `grain-jax fetch fashion|gcompris --output DIR [--deb FILE]`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from grain_jax.data.fetch import arguments
from grain_jax.data.fetch.settings import Settings

from grain_jax import errors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    try:
        given = arguments.parser().parse_args(argv)
        try:
            done = _fetch(given)
        except OSError as error:
            reason = f"{error.filename or given.output}: {error.strerror or error}"
            raise errors.UserError(f"{reason}; make room, or give another --output") from None
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    print(f"{given.output}: {done}", file=sys.stderr)
    return 0


def _fetch(given: argparse.Namespace) -> str:
    """Runs the command of these arguments; returns what was done."""
    if given.command == "gcompris":
        from grain_jax.data.fetch import gcompris

        return gcompris.write(given.output, deb=given.deb)
    from grain_jax.data.fetch import fashion

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(given, name) for name in names})
    return fashion.write(given.output, settings, deb=given.deb, processes=given.processes)


if __name__ == "__main__":
    sys.exit(main())
