"""Makes data sets of the pictures in Debian packages: `grain-jax fetch fashion|gcompris --output DIR [--deb FILE]`."""

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
        if given.command == "fashion":
            from grain_jax.data.fetch import fashion

            names = [field.name for field in dataclasses.fields(Settings)]
            settings = Settings(**{name: getattr(given, name) for name in names})
            done = fashion.write(given.output, settings, deb=given.deb, processes=given.processes)
        else:
            from grain_jax.data.fetch import gcompris

            done = gcompris.write(given.output, deb=given.deb)
    except errors.UserError as error:
        print(error, file=sys.stderr)
        return error.status
    print(f"{given.output}: {done}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
