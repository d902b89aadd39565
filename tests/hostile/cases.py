"""Runs a row of the tables of hostile input: a command, the line that it says, its exit status, its time."""

import contextlib
import io
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from grain_jax.core import errors

SECONDS = 20.0  # within which a command must end; most take milliseconds


class Outcome(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str
    seconds: float


def run(main: Callable[[Sequence[str]], int | None], arguments: Sequence[object]) -> Outcome:
    """Calls a command in this process; what it raises but SystemExit and UserError fails the test."""
    out, err, start = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments]) or 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except errors.UserError as error:  # `process.run` prints it
            print(error, file=err)
            status = error.status
    return Outcome(status, out.getvalue(), err.getvalue(), time.monotonic() - start)


def check(outcome: Outcome, line: str, status: int = 2) -> None:
    """The outcome is that status, says a line that matches the pattern, and shows no traceback."""
    assert "Traceback" not in outcome.err + outcome.out
    assert outcome.status == status, outcome.err
    assert any(re.search(line, x) for x in outcome.err.splitlines()), outcome.err
    assert outcome.seconds < SECONDS
