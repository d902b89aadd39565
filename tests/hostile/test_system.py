"""What the system refuses, what names bring to the terminal, and files of another form: one line each."""

import errno
import io
import resource

import pytest
from etils import epath

from grain_jax.cli import commands, process
from grain_jax.core import annotations, errors
from grain_jax.data.annotate import prompt
from grain_jax.evaluate import class_names, diagnostics, zeroshot
from grain_jax.inference import prompts
from grain_jax.runtime import checkpoint
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
    (OSError(errno.EDQUOT, "quota", "/x"), "^/x: Disk quota exceeded; make room", 1),
    (OSError(errno.EROFS, "read-only", "/x"), "^/x: Read-only file system; name a folder", 1),
    (OSError(errno.EIO, "x", "/x"), "^/x: Input/output error; the disk has a fault", 1),
    (ValueError("OUT_OF_RANGE: [OS error 27: File too large]"), "^File too large; raise", 1),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/dev/null/a"), "^/dev/null/a: Not", 2),
    (FileExistsError(errno.EEXIST, "File exists", "/dev/null"), "^/dev/null: File exists", 2),
    (FileNotFoundError(errno.ENOENT, "No such file", "a\x1b[2J"), r"^a\\x1b\[2J: No such", 2),
    (
        RuntimeError("Error executing an HTTP request: no such host\n\t when reading gs://b/c"),
        "^Error executing an HTTP request: no such host when reading gs://b/c; expected a network",
        1,
    ),
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


def test_a_small_limit_of_memory_is_a_line(monkeypatch):
    limit = lambda _: (10**9, resource.RLIM_INFINITY)
    monkeypatch.setattr(process.resource, "getrlimit", limit)
    cases.check(
        cases.run(commands.main, ["inspect", "x"]), "^ulimit -v: got 976562 KiB, expected unlimited"
    )
    assert cases.run(commands.main, ["inspect", "--help"]).status == 0


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


READERS = [  # name of the file; what reads it in a folder
    ("D.json", lambda f: zeroshot.read_descriptions(f / "D.json", ["a"])),
    ("classes.txt", lambda f: class_names.read(str(f / "classes.txt"))),
    ("templates.txt", lambda f: prompts.load_templates(f / "templates.txt")),
    ("A.jsonl", lambda f: annotations.read(f / "A.jsonl")),
    ("config.json", checkpoint.load_model),
    ("prompt.txt", lambda f: prompt.read_prompt(f / "prompt.txt", with_subject=False)),
]
CONTENTS = {"deep": b"[" * 100_000, "no text": b"\xff\xfe\0", "a list": b'[1, {"a": null}]\n'}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name,read", READERS, ids=[name for name, _ in READERS])
def test_a_file_of_another_form_is_a_line(tmp_path, name, read, content):
    (tmp_path / "params").mkdir()  # of a converted model
    (tmp_path / name).write_bytes(CONTENTS[content])
    outcome = cases.run(lambda _: read(tmp_path) and None, [])
    if outcome.status or not name.endswith(".txt") or content == "no text":
        cases.check(outcome, name)


def test_stored_matchings_are_of_the_declared_form(tmp_path, capsys):
    path = tmp_path / "m.json"
    for content in ("[]", '{"regions": 1}', '{"regions": "a", "evaluations": [{"step": "x"}]}'):
        path.write_text(content)
        assert diagnostics._evaluations(epath.Path(path), "a", 3) == []
        assert "m.json: " in capsys.readouterr().err


WHOLE = ["99999999999999999999", "9" * 5000, "-1", "1e3", "x"]


@pytest.mark.parametrize("text", WHOLE, ids=lambda x: x[:5])
@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "linear-probe", "--checkpoint=x", "--images=x", "--output=x", "--seeds"],
        ["evaluate", "hard-negatives", "--checkpoint=x", "--images=x", "--output=x", "--negatives"],
        ["evaluate", "maps", "--checkpoint=x", "--images=x", "--output=x", "--batch-size"],
        ["build", "--annotations=x", "--images=x", "--output=x", "--workers"],
    ],
    ids=lambda x: x[-1],
)
def test_whole_numbers_are_bounded(words, text):
    cases.check(cases.run(commands.main, [*words, text]), f"{words[-1]}: got '.*whole number in")
