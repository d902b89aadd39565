"""Texts of data and errors of the system on the terminal: it stays as it was, and an error is one line."""

import errno
import io
import json
import re
import unicodedata

import hypothesis
import pytest
from hypothesis import strategies as st

from grain_jax.cli import process
from grain_jax.core import errors, printable
from grain_jax.evaluate import tables
from tests import record_sets
from tests.hostile import cases

NASTY = [
    "\x1b[2J\x1b[1;1Howned\x07\r\b",
    "\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe",
    "\N{PARROT}\N{ZERO WIDTH JOINER}\N{FIRE} and \N{HEBREW LETTER ALEF}",
    "\0\ud800\uffff\N{LINE SEPARATOR}",
    "x" * 1_000_000,
    "\N{COMBINING ACUTE ACCENT}" * 300,
]
DIRECTIONS = "[\N{LEFT-TO-RIGHT EMBEDDING}-\N{RIGHT-TO-LEFT OVERRIDE}\u2066-\u2069]"


def moves_nothing(text, keep=""):
    moving = {x for x in text if unicodedata.category(x) in ("Cc", "Cs", "Zl", "Zp")}
    return moving <= set(keep) and not re.search(DIRECTIONS, text)


@hypothesis.settings(max_examples=40, deadline=None, database=None, derandomize=True)
@hypothesis.given(st.one_of(st.sampled_from(NASTY), st.text(max_size=60)))
def test_texts_errors_and_tables_cannot_move_the_terminal(text):
    plain = printable.plain(text, 200)
    assert moves_nothing(plain) and len(plain) <= 10 * 200
    plain.encode()  # raises for halves of characters
    assert plain == text or not text.isprintable() or len(text) > 200
    assert moves_nothing(str(errors.UserError(f"{text}: got it\nand more")), keep="\n\t")
    lines = tables.table(["set", "value"], [[text, "1"], ["b", text]]).splitlines()
    assert all(moves_nothing(line) for line in lines) and len(lines) == 4
    assert max(map(len, lines)) < 3000


def test_build_names_such_keys_and_files(tmp_path):
    record_sets.write_annotations(tmp_path / "in", 2)
    line = record_sets.annotation(0) | {"image": NASTY[0], NASTY[0]: 1}
    with (tmp_path / "in" / "A.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    outcome = cases.run(lambda _: record_sets.build_set(tmp_path / "in", tmp_path / "out"), [])
    cases.check(outcome, r"A.jsonl:3: image: got .*u001b")
    assert moves_nothing(outcome.err, keep="\n") and "\\x1b[2J" in outcome.err


def run_in_shell(main):
    """`cases.run` of a command as a process runs it."""
    return cases.run(lambda words: process.run(main, words), [])


REMOTE = "Error executing an HTTP request: no such host\n\t when reading gs://b/c"
REFUSED = [  # error; line; status
    (OSError(errno.ENOSPC, "No space", "/x/a"), "^/x/a: No space left on device; make room", 1),
    (OSError(errno.EFBIG, "File too large"), "^File too large; raise .*ulimit -f", 1),
    (FileNotFoundError(errno.ENOENT, "No such file", "a\x1b[2J"), r"^a\\x1b\[2J: No such", 2),
    (RuntimeError(REMOTE), "^Error .*: no such host when reading gs://b/c; expected a network", 1),
]


@pytest.mark.parametrize("error,line,status", REFUSED, ids=lambda x: str(x)[:30])
def test_what_the_system_refuses_is_a_line(error, line, status):
    def main(_):
        raise KeyError("x") from error

    outcome = run_in_shell(main)
    cases.check(outcome, line, status)
    assert len(outcome.err.splitlines()) == 1


def test_another_error_stays_one():
    with pytest.raises(ZeroDivisionError):
        run_in_shell(lambda _: 1 / 0)
    assert errors.of_system(OSError("x")) is None and errors.of_system(None) is None


def test_what_a_command_prints_cannot_move_the_terminal():
    name = "a\x1b[2J\x1b]0;owned\x07\r\u202eb"

    def main(_):
        print(name, "http://x/\x1b[31m", end="\n")
        print(f"\r\x1b[2K{name}", end="", file=io.TextIOWrapper(io.BytesIO()))
        print(f"\r\x1b[2Kstep 1 {name}\x1b[K", end="", file=process.sys.stderr)

    outcome = run_in_shell(main)
    plain = r"a\x1b[2J\x1b]0;owned\x07\r\u202eb"
    assert outcome.out == f"{plain} http://x/\\x1b[31m\n"
    assert outcome.err == f"\r\x1b[2Kstep 1 {plain}\x1b[K"
