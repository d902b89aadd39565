"""python -m grain_jax.report DIR [DIR ...]: writes report.html, one page about a run or several side by side.

The model of each run runs on images of the evaluations in its config; the results are saved as
`report_data.json` in the workdir. Wrong usage or input: one line an error, status 2.
"""

import argparse
import sys
from collections.abc import Sequence

from grain_jax import errors
from grain_jax.report import collect, page
from grain_jax.runtime.arguments import Parser

_SMALLER = f"give a smaller --pictures, or --no-model; or {errors.MORE_MEMORY}"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of images, at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit status: 0, or 2 after a line on stderr for each error."""
    parser = Parser(
        prog="grain_jax.report",
        description=__doc__,
    )
    parser.add_argument("workdir", nargs="+", help="of a run; several are shown side by side")
    parser.add_argument("--output", help="the page; default: report.html in the first workdir")
    parser.add_argument(
        "--results",
        action="append",
        default=[],
        help="OUT.json of grain_jax.evaluate for the first run, also several; those in a workdir are found",
    )
    parser.add_argument(
        "--pictures",
        type=_count,
        default=collect.IMAGES,
        help="images of each evaluation that the model runs on (default %(default)s)",
    )
    parser.add_argument(
        "--no-model", action="store_true", help="load no model; show only what the files hold"
    )
    try:
        args = parser.parse_args(arguments)
        first, *others = args.workdir
        with errors.out_of_memory_in_a_line("report", lambda: _SMALLER):
            path = page.write(
                first,
                others=others,
                output=args.output,
                results=args.results,
                num_images=args.pictures,
                model=not args.no_model,
            )
    except (errors.UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
