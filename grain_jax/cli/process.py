"""A command as a process: faults of its user become lines on stderr, and its exit status."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from grain_jax import errors

USAGE_ERROR = errors.UserError.status
_NO_READER = 141  # as a shell says it: 128 + SIGPIPE


def fail(message: object, status: int = USAGE_ERROR) -> NoReturn:
    """Prints the fault (a line each, then their number) on stderr and exits, with status 2 for wrong usage."""
    lines = str(message).strip().splitlines()
    print(*lines, sep="\n", file=sys.stderr)
    if len(lines) > 1:
        print(f"{len(lines)} lines of faults; nothing was run", file=sys.stderr)
    sys.exit(status)


def run(
    main: Callable[[Sequence[str] | None], int | None], arguments: Sequence[str] | None = None
) -> NoReturn:
    """Runs a command and exits with its status.

    Args:
      main: takes the arguments and returns the status, None for 0.
      arguments: without the program's name; those of this process by default.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with errors.out_of_memory_in_a_line("this command"):
            status = main(arguments)
        _flush()
        sys.exit(status or 0)
    except errors.UserError as error:
        fail(error, error.status)
    except SystemExit:  # of --help, too
        _flush()
        raise
    except BrokenPipeError:
        _flush()
        raise


def _flush() -> None:
    """Ends the process without a word where the reader of stdout is gone, as `| head` is."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(_NO_READER)
