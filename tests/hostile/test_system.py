"""What the system refuses, and what names bring to the terminal: one line each."""

import errno
import io

import pytest

from grain_jax.cli import process
from grain_jax.core import errors
from tests.hostile import cases


def of_shell(main, arguments=()):
    """`cases.run` of a command as a process runs it."""
    return cases.run(lambda given: process.run(main, given), arguments)


def raises(error):
    def main(_):
        raise error

    return main


REFUSED = [  # error; line; status
    (OSError(errno.ENOSPC, "No space", "/x/a"), "^/x/a: No space left on device; make room", 1),
    (OSError(errno.EFBIG, "File too large"), "^File too large; raise .*ulimit -f", 1),
    (FileNotFoundError(errno.ENOENT, "No such file", "a\x1b[2J"), r"^a\\x1b\[2J: No such", 2),
    (RuntimeError("can't start new thread"), "no more threads: raise .*ulimit -u", 2),
]


@pytest.mark.parametrize("error,line,status", REFUSED, ids=lambda x: str(x)[:30])
def test_what_the_system_refuses_is_a_line(error, line, status):
    outcome = of_shell(raises(error))
    cases.check(outcome, line, status)
    assert len(outcome.err.splitlines()) == 1
    try:
        raise KeyError("x") from error
    except KeyError as later:
        assert str(errors.of_system(later)) == str(errors.of_system(error))


def test_another_error_stays_one():
    with pytest.raises(ZeroDivisionError):
        of_shell(raises(ZeroDivisionError("x")))
    assert errors.of_system(OSError("x")) is None and errors.of_system(None) is None


NAME = "a\x1b[2J\x1b]0;owned\x07\r\u202eb"


def test_what_a_command_prints_cannot_move_the_terminal():
    def main(_):
        print(NAME, "http://x/\x1b[31m", end="\n")
        print(f"\r\x1b[2K{NAME}", end="", file=io.TextIOWrapper(io.BytesIO()))
        print(f"\r\x1b[2Kstep 1 {NAME}\x1b[K", end="", file=process.sys.stderr)

    outcome = of_shell(main)
    plain = r"a\x1b[2J\x1b]0;owned\x07\r\u202eb"
    assert outcome.out == f"{plain} http://x/\\x1b[31m\n"
    assert outcome.err == f"\r\x1b[2Kstep 1 {plain}\x1b[K"
