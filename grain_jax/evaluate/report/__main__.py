"""grain-jax report DIR: writes report.html, one page about a run. Wrong usage or input: one line an error, status 2."""

import sys
from collections.abc import Sequence

from grain_jax.core import errors
from grain_jax.evaluate.report import page
from grain_jax.evaluate.report.arguments import Report

_SMALLER = f"give a smaller --num-images, or --no-model; or {errors.MORE_MEMORY}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit status: 0, or 2 after one line per error on stderr."""
    try:
        args = Report.parse(arguments)
        with errors.out_of_memory_in_a_line("report", lambda: _SMALLER):
            path = page.write(
                args.workdir,
                output=args.output,
                num_images=args.num_images,
                model=args.model,
            )
    except (errors.UserError, OSError) as error:
        known = isinstance(error, errors.UserError)
        print(error if known else errors.of_system(error) or error, file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
