"""A file is replaced whole; a device is written to."""

import os
import stat
import subprocess
import sys

import pytest

from grain_jax.core import atomic
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
    assert (
        stat.S_ISCHR(os.stat("/dev/null").st_mode) and os.stat("/dev/null").st_ino == device.st_ino
    )
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text("/dev/full", "text")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_standard_output_as_a_file_keeps_what_is_in_it(tmp_path):
    code = "from grain_jax.core import atomic; print('first', flush=True); atomic.write_text('/dev/stdout', 'second\\n')"
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
