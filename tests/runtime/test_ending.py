"""Nothing holds the process up: a second signal, a run that stands still, a fault that cannot be closed."""

import errno
import logging
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from grain_jax import errors
from grain_jax.runtime import ending
from tests.paths import ROOT

_START = """
import ctypes, os, sys, threading, time
from grain_jax import errors
from grain_jax.runtime import ending
"""


def _process(code):
    return subprocess.Popen(
        [sys.executable, "-c", _START + code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def _ends(process, status, within=20):
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert time.monotonic() - began < within and "Traceback" not in said
    return said


_STANDS = """
handler = ending.PreemptionHandler()
handler.listen()
with handler.training():
    print("training", file=sys.stderr, flush=True)
    for _ in range(4):  # a signal ends one
        ctypes.CDLL(None).sleep(60)  # no Python runs on this thread
"""


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(number, status):
    process = _process(_STANDS)
    assert "training" in process.stderr.readline()
    for _ in range(2):  # the second one within a second: the same Ctrl-C, by way of a launcher
        process.send_signal(number)
        time.sleep(0.3)
    assert process.poll() is None
    time.sleep(1)
    process.send_signal(number)
    said = _ends(process, status, within=7)
    assert f"{number.name}: saving after this step; a second signal ends without" in said
    assert said.strip().splitlines()[-1] == (
        f"{number.name}, the second: ending at once; the same command goes on from the newest checkpoint"
    )


def test_a_run_that_stands_still_names_where(tmp_path):
    """The input reads a FIFO that nobody writes."""
    process = _process(f"""
import os, jax
from grain_jax.input_pipeline import device
os.mkfifo({str(tmp_path / "shard")!r})
def batches():
    yield open({str(tmp_path / "shard")!r}).read()
watch = ending.Watchdog(2)
waiting = device.Prefetch(batches(), None, 1)
with watch.running(7):
    with watch.pause():
        time.sleep(3)
    watch.stepped(8)
    next(waiting)
""")
    said = _ends(process, 124)
    found = re.fullmatch(
        r"ending: no step for 2 s \(--stall-seconds\); waiting for the next batch \(input\), last step 8\."
        r" Stacks of all threads: (\S+)\nThe same command goes on from the newest checkpoint\.\n",
        said,
    )
    assert found, said
    stacks = pathlib.Path(found[1])
    assert "device.py" in stacks.read_text()
    stacks.unlink()


def test_a_fault_that_cannot_be_closed_is_told_and_ends_the_process():
    process = _process("""
from grain_jax.runtime import metrics_writer
ending.FAULT_SECONDS = 2
watch = ending.Watchdog(0)
try:
    with watch.running(3):
        raise metrics_writer.NotFinite("loss is nan at step 4")
finally:
    threading.Event().wait()  # as a save whose threads wait for each other
""")
    lines = _ends(process, 1).splitlines()
    assert lines[0] == "loss is nan at step 4"
    assert lines[1].startswith("ending: not over 2 s after this fault; ") and len(lines) == 2
    pathlib.Path(lines[1].split()[-1]).unlink()


@pytest.mark.parametrize("end,status,said", [("sys.exit(2)", 2, ""), ("pass", 0, "")])
def test_threads_that_never_end_do_not_keep_it(end, status, said):
    process = _process(f"""
def command():
    threading.Thread(target=threading.Event().wait).start()
    ending.at_end(lambda: print("mark removed", file=sys.stderr))
    {end}
ending.run(command)
""")
    assert _ends(process, status) == "mark removed\n"


def test_negative_seconds_are_refused():
    with pytest.raises(errors.UserError, match="--stall-seconds: got -1"):
        ending.Watchdog(-1)


@pytest.fixture
def quiet():
    hooks = threading.excepthook, sys.unraisablehook, sys.excepthook
    ending.quiet_threads()
    yield
    threading.excepthook, sys.unraisablehook, sys.excepthook = hooks
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        logger.removeFilter(logger.filters[-1])


def _in_a_thread(error):
    def fail():
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("save failed") from cause

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


def test_other_threads_say_nothing_of_a_full_disk(quiet, capsys, caplog):
    full = OSError(errno.ENOSPC, "No space left on device")
    seen = []
    threading.excepthook, before = lambda args: seen.append(args.exc_value), threading.excepthook
    ending.quiet_threads()
    _in_a_thread(full)
    assert not seen
    _in_a_thread(KeyError("x"))
    assert str(seen[0]) == "save failed"
    threading.excepthook = before
    sys.excepthook(
        RuntimeError, RuntimeError("Event loop is closed"), None
    )  # as a thread of C++ does
    assert capsys.readouterr().err == ""
    sys.excepthook(RuntimeError, RuntimeError("another"), None)
    assert "RuntimeError: another" in capsys.readouterr().err
    logger = logging.getLogger("absl")
    logger.removeFilter(logger.filters[-1])
    try:
        raise full
    except OSError:
        logger.exception("thread t raised an exception")
    logger.error("without one")
    assert [record.getMessage() for record in caplog.records] == ["without one"]


@pytest.mark.parametrize("remove", [True, False])
def test_a_workdir_that_is_gone_is_a_line(tmp_path, remove):
    workdir = tmp_path / "run"
    if not remove:
        workdir.mkdir()
    expected = "the folder was removed" if remove else "x: Is a directory"
    with pytest.raises(errors.StorageFault, match=expected):
        with ending.in_a_line(workdir):
            if not remove:
                (workdir / "x").mkdir()
            (workdir / "x").write_text("x")
