"""A conversion is written beside its folder and takes its place as a whole."""

import errno
import json
import pathlib
import subprocess
import sys

import pytest
from etils import epath

from grain_jax import inference
from grain_jax.checkpoint import saved_model
from grain_jax.convert import __main__ as convert
from grain_jax.convert import export, output
from grain_jax.convert.faults import ConvertError
from grain_jax.core import errors

# Kills the exchange before each of its calls to the system; prints what is there then, and after a new start.
KILLED = """
import json, os, pathlib, shutil, signal, sys
from etils import epath
from grain_jax.convert import output

root = pathlib.Path(sys.argv[1])

def fill(folder, word):
    (folder / "params").mkdir(parents=True)
    for name in ("params/a", "config.json"):
        (folder / name).write_text(word)

def content():
    files = [x for x in (root / "model").rglob("*") if x.is_file()]
    return sorted({x.read_text() for x in files}), len(files)

def child(run):
    number = os.fork()
    if number == 0:
        run()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])

def write(kill_at=0, fails=False):
    left = [kill_at]
    def count(event, arguments):
        if event in ("open", "fcntl.flock") or event.startswith(("os.", "shutil.")):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    try:
        with output.replacing(epath.Path(root / "model")) as new:
            fill(pathlib.Path(new), "new")
            if fails:
                raise KeyError
    except KeyError:
        pass

found = []
for kill_at in range(1, 1000):
    shutil.rmtree(root)
    fill(root / "model", "old")
    status = child(lambda: write(kill_at))
    killed = content()
    child(lambda: write(fails=True))
    found.append([status, killed, content(), sorted(os.listdir(root))])
    if status == 0:
        break
print(json.dumps(found))
"""


def test_a_kill_at_any_moment_leaves_the_old_model_or_the_new_one(tmp_path):
    (tmp_path / "root").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "root")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    killed_runs = json.loads(printed.splitlines()[-1])
    old, new = [["old"], 2], [["new"], 2]
    count = len(killed_runs)
    assert [status for status, *_ in killed_runs[:-1]] == [-9] * (count - 1) and count > 20
    assert all(killed in (old, new, [[], 0]) for _, killed, *_ in killed_runs)
    assert sum(killed == [[], 0] for _, killed, *_ in killed_runs) <= 2  # between the two renames
    assert all(after in (old, new) for _, _, after, _ in killed_runs)
    assert [after for _, _, after, _ in killed_runs].count(old) > 10
    assert all(names == ["model"] for *_, names in killed_runs)


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names_in(folder):
    return {str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*") if not path.is_dir()}


def test_what_an_older_conversion_wrote_goes_and_the_users_files_stay(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "onnx.json", "boxes.onnx", "boxes.onnx.data", "spiece.model", "a.txt", ".git/HEAD")
    with output.replacing(output.check_free(out, "onnx.json"), "onnx.json") as new:
        write(new, "onnx.json", "image.onnx")
    assert names_in(out) == {"a.txt", ".git/HEAD", "onnx.json", "image.onnx"}
    with pytest.raises(ConvertError, match="in use by something else; expected a new folder"):
        output.check_free(out)
    write(out, "metrics.jsonl")
    with pytest.raises(ConvertError, match="out: is a run of grain-jax train; expected a new"):
        output.check_free(out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConvertError, match="is the current folder, expected another one"):
        output.check_free(".", "out")


def test_a_fault_leaves_the_old_folder(tmp_path):
    out = epath.Path(tmp_path / "out")
    write(out, "params/a")
    full = OSError(28, "No space left on device")
    for fault, said in (
        (full, f"^{out}: No space left on device; make room"),
        (errors.UserError("a line"), "^a line"),
    ):
        with pytest.raises(errors.UserError, match=said), output.replacing(out) as new:
            write(new, "params/b")
            raise fault
        assert names_in(tmp_path) == {"out/params/a"} and [*tmp_path.iterdir()] == [tmp_path / out]


def test_of_two_writers_the_second_is_told(tmp_path):
    out = epath.Path(tmp_path / "out")
    with output.replacing(out) as new:
        with pytest.raises(ConvertError, match=f"{out}: another process writes it; wait for it"):
            with output.replacing(out):
                pass
        write(new, "params/a")
    assert names_in(out) == {"params/a"}


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, capsys):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "", str(path))

    monkeypatch.setattr(type(epath.Path()), "mkdir", refuse)
    out = tmp_path / "out"
    for main, words, module, work in (
        (export.main, ["--checkpoint"], inference, "load"),
        (convert.main, ["pack", "--input"], saved_model, "load_model"),
    ):
        monkeypatch.setattr(module, work, lambda *_: pytest.fail("it worked"))
        assert main([*words, "model", "--output", str(out)]) == 1
        said = f"{out}.incomplete: Read-only file system; name a folder that can be written\n"
        assert capsys.readouterr().err == said


def test_a_store_gets_the_mark_first_and_nothing_of_the_old_folder(tmp_path, monkeypatch):
    class Store:
        """A folder of an object store, kept in a local one."""

        local = epath.Path(tmp_path / "store")

        def __str__(self):
            return "gs://bucket/out"

        def __getattr__(self, name):
            return getattr(self.local, name)

        def __truediv__(self, name):
            return self.local / name

    write(Store.local, "params/old", "image.onnx")
    copied, copy = [], type(Store.local).copy
    monkeypatch.setattr(
        type(Store.local), "copy", lambda path, to: copied.append(path.name) or copy(path, to)
    )
    with output.replacing(Store()) as new:
        write(new, "config.json", "params/a", "params/d/b")
    assert names_in(Store.local) == {"config.json", "params/a", "params/d/b"}
    assert set(copied[:2]) == {"a", "b"} and copied[2:] == ["config.json"]
