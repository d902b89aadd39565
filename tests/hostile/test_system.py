"""What the system refuses, what names bring to the terminal, and what hangs a reader: one line each."""

import contextlib
import errno
import io
import os
import resource
import shutil
import stat

import pytest
from etils import epath

from grain_jax import config as config_lib
from grain_jax.cli import commands, process
from grain_jax.convert import model_card
from grain_jax.core import annotations, errors
from grain_jax.data import duplicates
from grain_jax.data.annotate import outputs, prompt
from grain_jax.data.inspect import __main__ as inspect_command
from grain_jax.data.inspect import reading
from grain_jax.evaluate import class_names, diagnostics, suite, zeroshot
from grain_jax.inference import prompts
from grain_jax.input_pipeline import record_files
from grain_jax.report import __main__ as report_command
from grain_jax.report import run_files
from grain_jax.runtime import checkpoint, checkpoint_files, receipt
from tests import perturbed, record_sets
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A record set and a model."""
    folder = tmp_path_factory.mktemp("made")
    record_sets.write_annotations(folder / "images", 4)
    with contextlib.redirect_stdout(io.StringIO()):
        assert record_sets.build_set(folder / "images", folder / "data", "--num-shards=1") == 0
    model = perturbed.tiny()
    checkpoint.save_model(folder / "model", model, perturbed.params(model))
    return folder


@pytest.mark.parametrize("out", ["/dev/null", "/dev/full", "pipe"])
def test_an_output_is_written_to_and_not_replaced(made, tmp_path, out):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / out
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    outcome = of_shell(report_command.main, [run, "--no-model", "--output", path])
    if out == "/dev/null":
        assert outcome.status == 0
    else:
        cases.check(outcome, f"^{path}: No s")
    assert suite._read(path, again=False) is None
    with contextlib.redirect_stderr(io.StringIO()):
        saved = suite._write(path, {"ran": {}, "failed": {}}, config_lib.Suite(evals={}))
    assert saved == (out == "/dev/null")
    outcome = of_shell(inspect_command.main, [made / "data" / "tiny_set", "--output", path])
    cases.check(outcome, "File exists")
    mode = os.stat(path).st_mode
    assert stat.S_ISFIFO(mode) if out == "pipe" else stat.S_ISCHR(mode)
    assert sorted(os.listdir(tmp_path)) == ["pipe", "run"]


def _settings(folder):
    outputs.Output(str(folder)).agree({})


READERS = [  # name of the file; what reads it in a folder
    ("D.json", lambda f: zeroshot.read_descriptions(f / "D.json", ["a"])),
    ("classes.txt", lambda f: class_names.read(str(f / "classes.txt"))),
    ("templates.txt", lambda f: prompts.load_templates(f / "templates.txt")),
    ("A.jsonl", lambda f: annotations.read(f / "A.jsonl")),
    ("receipts.jsonl", receipt.read),
    ("config.json", checkpoint.load_model),
    ("config.json", model_card.read_run),
    ("prompt.txt", lambda f: prompt.read_prompt(f / "prompt.txt", with_subject=False)),
    ("settings.json", _settings),
    ("fingerprints.npy", lambda f: duplicates.of_set(f, workers=1)),
    ("metadata.json", lambda f: reading.open_set(str(f), None)),
    ("dataset_info.json", record_files.read_info),
    ("params/manifest.ocdbt", checkpoint.load_model),
    ("params/d", checkpoint.load_model),
]
CONTENTS = {
    "a pipe": os.mkfifo,
    "an endless file": lambda path: path.symlink_to("/dev/zero"),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\0"),
    "a list": lambda path: path.write_text('[1, {"a": null}]\n'),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name,read", READERS, ids=[f"{i}-{x[0]}" for i, x in enumerate(READERS)])
def test_readers(made, tmp_path, name, read, content):
    folder = tmp_path / "copy"
    source = (
        made / "model" if name.startswith(("config", "params")) else made / "data/tiny_set/1.0.0"
    )
    shutil.copytree(source, folder)
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    CONTENTS[content](path)
    outcome = cases.run(lambda _: read(folder) and None, [])
    text = name.endswith(".txt") and content in ("deep", "a list")
    if outcome.status == 0:
        assert text or (name, content) in {("receipts.jsonl", "deep"), ("receipts.jsonl", "a list")}
    else:
        cases.check(outcome, f"{path.name}|{folder}")


RECORDS = ['{"step": "x"}', "[]", "[" * 10**5, '{"step": NaN}', "{", '{"step": 1}']


@pytest.mark.parametrize("line", RECORDS, ids=lambda x: x[:9])
def test_a_record_is_of_the_declared_form(tmp_path, line):
    with pytest.raises(
        errors.UserError, match=r"^r:1: got .*, expected a record of a run$"
    ) as told:
        receipt.record_of(line, "r:1")
    assert "\n" not in str(told.value)
    (tmp_path / receipt.FILE).write_text(line + "\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert "is damaged" in run_files.read(tmp_path).environment["receipt"]


def test_stored_matchings_are_of_the_declared_form(tmp_path, capsys):
    path = tmp_path / "m.json"
    for content in ("[]", '{"regions": 1}', '{"regions": "a", "evaluations": [{"step": "x"}]}'):
        path.write_text(content)
        assert diagnostics._evaluations(epath.Path(path), "a", 3) == []
        assert "m.json: " in capsys.readouterr().err


def test_a_link_to_a_folder_in_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "d").symlink_to(tmp_path)
    with pytest.raises(checkpoint_files.CheckpointError, match="d: got a pipe, device or link"):
        checkpoint_files.check_files(tmp_path / "state")


WHOLE = ["99999999999999999999", "9" * 5000, "-1", "1e3", "x"]


@pytest.mark.parametrize("text", WHOLE, ids=lambda x: x[:5])
@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "linear-probe", "--checkpoint=x", "--images=x", "--output=x", "--seeds"],
        ["evaluate", "hard-negatives", "--checkpoint=x", "--images=x", "--output=x", "--negatives"],
        ["evaluate", "maps", "--checkpoint=x", "--images=x", "--output=x", "--batch-size"],
        ["build", "--annotations=x", "--images=x", "--output=x", "--workers"],
        ["verify", "x", "--from"],
    ],
    ids=lambda x: x[-1],
)
def test_whole_numbers_are_bounded(words, text):
    cases.check(cases.run(commands.main, [*words, text]), f"{words[-1]}: got '.*whole number in")
