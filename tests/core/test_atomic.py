"""A file is replaced whole, and only by what is on the disk; a device is written to."""

import errno
import os
import pathlib
import stat
import subprocess
import sys

import pytest
from etils import epath

from grain_jax.convert import output
from grain_jax.core import atomic
from grain_jax.data import job, staging
from tests.paths import ROOT


def test_a_file_or_a_link_is_replaced(tmp_path):
    other = tmp_path / "other"
    other.write_text("old")
    (tmp_path / "link").symlink_to(other)
    for name in ("new", "link"):
        atomic.write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    assert other.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["link", "new", "other"]


def test_devices_are_written_to():
    device = os.stat("/dev/null")
    atomic.write_text("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and os.stat("/dev/null").st_ino == device.st_ino
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text("/dev/full", "text")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_standard_output_as_a_file_keeps_what_is_in_it(tmp_path):
    code = "from grain_jax.core import atomic; print('first', flush=True)"
    code += "; atomic.write_text('/dev/stdout', 'second\\n')"
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "first\nsecond\n"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")
    code = (
        "import resource, signal, sys; from grain_jax.core import atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: atomic.write_text(sys.argv[1], 'x' * 100)\n"
        "except OSError as error: print(error.errno)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "27\n", done.stderr  # EFBIG
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def _join(folder):
    (folder / "a").mkdir()
    (folder / "a/1.jsonl").write_text("line")
    job.Output(str(folder)).join("a", ["1"], "target")


def _set(folder):
    with staging.replacing(folder / "name/target") as new:
        (new / "name/target").mkdir(parents=True)
        (new / "name/target/records").write_text("new")


def _conversion(folder):
    with output.replacing(folder / "target") as new:
        (new / "params").mkdir()
        (new / "params/a").write_text("new")


WRITERS = [  # each; how many files and folders have the name after it
    (lambda folder: atomic.write_text(folder / "target", "new"), 1),
    (lambda folder: job.Output(str(folder)).put_record({"a": 1}, "b", "target"), 1),
    (_join, 1),
    (_set, 2),
    (_conversion, 3),
]


@pytest.mark.parametrize("write,count", WRITERS)
def test_a_name_is_given_to_what_is_on_the_disk(write, count, tmp_path, monkeypatch):
    real, calls = (os.fsync, os.replace), []

    def fsync(descriptor):
        calls.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        real[0](descriptor)

    def replace(new, path):
        calls.append((str(new), pathlib.Path(path)))
        real[1](new, path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write(epath.Path(tmp_path))
    *synced, (new, target), parent = calls
    assert target.name == "target" and parent == str(target.parent)
    written = [target, *target.rglob("*")]
    assert len(written) == count
    assert set(synced) == {str(path).replace(str(target), new) for path in written}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_disk_that_fails_is_an_error_and_one_that_cannot_wait_is_none(code, tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(code, os.strerror(code))

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output error.*/a'$"):
            atomic.write_text(tmp_path / "a", "new")
    else:
        atomic.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == ("old" if code == errno.EIO else "new")
    assert os.listdir(tmp_path) == ["a"]


def test_a_store_takes_whole_objects_and_is_not_waited_for(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    remote = type(epath.Path("gs://b/a"))
    monkeypatch.setattr(remote, "write_bytes", lambda *x: calls.append(x))
    monkeypatch.setattr(remote, "replace", lambda *x: calls.append(x))
    a, b = epath.Path("gs://b/a"), epath.Path("gs://b/b")
    atomic.write_bytes("gs://b/a", b"new")
    atomic.replace("gs://b/a", "gs://b/b")
    assert calls == [(a, b"new"), (a, b)]
