"""How a trainer ends: nothing holds the process up, and a disk that refuses is one line."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from grain_jax.core import errors
from grain_jax.runtime import ending
from tests.paths import ROOT

_START = """
import ctypes, os, subprocess, sys, threading, time
from grain_jax.core import errors
from grain_jax.runtime import ending
"""


def _process(code):
    command = [sys.executable, "-c", _START + code]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def _ends(process, status):
    """What it said; by itself it would go on for much longer than a minute."""
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status and "Traceback" not in said, said
    return said


_STANDS = """
handler = ending.PreemptionHandler()
handler.listen()
with handler.training():
    print("training", file=sys.stderr, flush=True)
    for _ in range(4):  # a signal ends one
        ctypes.CDLL(None).sleep(600)  # no Python runs on this thread
"""
_COMPILES = """
handler = ending.PreemptionHandler()
handler.listen()
child = subprocess.Popen(["sleep", "600"])
ending.at_end(child.terminate)
print(child.pid, file=sys.stderr, flush=True)
for _ in range(2):
    ctypes.CDLL(None).sleep(600)
"""


def test_a_second_signal_ends_at_once():
    process = _process(_STANDS)
    assert "training" in process.stderr.readline()
    for _ in range(2):  # the second one within a second: the same Ctrl-C, by way of a launcher
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = _ends(process, 130)
    assert "SIGINT: saving after this step; a second signal ends without" in said
    assert "SIGINT, the second: ending at once; the same command goes on" in said


def test_told_to_end_while_there_is_nothing_to_save_it_ends_with_its_child():
    process = _process(_COMPILES)
    child = int(process.stderr.readline())
    process.send_signal(signal.SIGTERM)
    assert _ends(process, 75).strip() == "SIGTERM: there is nothing to save"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(child, 0)
            time.sleep(0.05)


def test_a_run_that_stands_still_names_where(tmp_path):
    """The input reads a FIFO that nobody writes."""
    process = _process(f"""
from grain_jax.input_pipeline import device
os.mkfifo({str(tmp_path / "shard")!r})
def batches():
    yield open({str(tmp_path / "shard")!r}).read()
watch = ending.Watchdog(2)
waiting = device.Prefetch(batches(), None, 1)
with watch.running(7):
    with watch.pause():
        time.sleep(3)
    for _ in range(4):  # longer than the limit, in all
        time.sleep(0.7)
        watch.stepped(8)
    with watch.doing("waiting for the next batch (input)"):
        next(waiting)
""")
    said = _ends(process, 124)
    line, stacks = said.split("\n", 1)
    assert line == (
        "ending: no step for 2 s (--stall-seconds); waiting for the next batch (input), last step 8."
        " Stacks of all threads:"
    )
    assert "device.py" in stacks


def test_a_fault_that_cannot_be_closed_is_told_and_ends_the_process():
    process = _process("""
from grain_jax.train import faults
ending.FAULT_SECONDS = 2
watch = ending.Watchdog(0)
try:
    with watch.running(3):
        raise faults.NotFinite("loss is nan at step 4")
finally:
    threading.Event().wait()  # as a save whose threads wait for each other
""")
    lines = _ends(process, 1).splitlines()
    assert lines[0] == "loss is nan at step 4"
    assert lines[1].startswith("ending: not over 2 s after this fault; ")


def test_a_full_disk_is_one_line():
    with pytest.raises(errors.StorageFault, match="^/run: No space left on device; .*; again$") as e:
        with errors.storage_faults_as_one_line("/run", "again"):
            raise RuntimeError("save failed") from OSError(errno.ENOSPC, "No space left on device")
    assert len(str(e.value).splitlines()) == 1
    full = OSError(errno.ENOSPC, "No space", "/x")
    line = "/x: No space left on device; make room, or name another disk"
    assert ending.end_by(full) == (1, line)
    with pytest.raises(RuntimeError, match="save failed"):
        with errors.storage_faults_as_one_line("/"):
            raise RuntimeError("save failed") from RuntimeError("another")
