"""What the system refuses is one line with its place and what to do; another error stays one."""

import errno

import pytest

from grain_jax.cli import process
from grain_jax.core import errors
from tests.hostile import cases


def raises(error):
    def main(_):
        raise error

    return main


REFUSED = [  # error; line; status
    (OSError(errno.ENOSPC, "No space", "/x/a"), "^/x/a: No space left on device; make room", 1),
    (ValueError("OUT_OF_RANGE: [OS error 27: File too large]"), "^File too large; raise", 1),
    (FileNotFoundError(errno.ENOENT, "No such file", "a\x1b[2J"), r"^a\\x1b\[2J: No such", 2),
    (
        RuntimeError("Error executing an HTTP request: no such host\n\t when reading gs://b/c"),
        "^Error executing an HTTP request: no such host when reading gs://b/c; expected a network",
        1,
    ),
]


@pytest.mark.parametrize("error,line,status", REFUSED, ids=lambda x: str(x)[:30])
def test_what_the_system_refuses_is_a_line(error, line, status):
    outcome = cases.run(lambda words: process.run(raises(error), words), [])
    cases.check(outcome, line, status)
    assert len(outcome.err.splitlines()) == 1


def test_another_error_stays_one():
    with pytest.raises(ZeroDivisionError):
        process.run(raises(ZeroDivisionError("x")), [])
    assert errors.of_system(OSError("x")) is None and errors.of_system(None) is None
