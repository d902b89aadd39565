"""Texts of users in every place that shows them: whatever they hold, nothing ends and the terminal stays."""

import json
import re
import unicodedata

import hypothesis
from hypothesis import strategies as st

from grain_jax.core import errors, images, printable
from grain_jax.data import build
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
texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=60))
few = hypothesis.settings(max_examples=40, deadline=None, database=None, derandomize=True)


def moves_nothing(text, keep=""):
    return all(
        x in keep or unicodedata.category(x) not in ("Cc", "Cs", "Zl", "Zp") for x in text
    ) and not re.search(
        "[\N{LEFT-TO-RIGHT EMBEDDING}-\N{RIGHT-TO-LEFT OVERRIDE}\u2066-\u2069]", text
    )


@few
@hypothesis.given(texts)
def test_plain(text):
    found = printable.plain(text, 200)
    assert moves_nothing(found) and len(found) <= 10 * 200
    found.encode()  # raises for halves of characters
    if text.isprintable() and len(text) <= 200:
        assert found == text


@few
@hypothesis.given(texts)
def test_an_errors_lines_cannot_move_the_terminal(text):
    for kind in (errors.UserError, images.ImageError, build.BuildError):
        assert moves_nothing(str(kind(f"{text}: got it\nand more")), keep="\n\t")


@few
@hypothesis.given(texts)
def test_tables(text):
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
