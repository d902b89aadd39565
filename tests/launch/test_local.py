"""launch.local with small stand-ins for the trainer: what it hands over, signals, deaths, statuses."""

import os
import signal
import subprocess
import sys
import time

import pytest

from grain_jax.launch import local
from tests.paths import ROOT

LOCAL = [sys.executable, "-m", "grain_jax.launch.local"]
# The stand-ins know their number as the trainer does, from the last flag.
_ME = "import os, signal, sys, time; me = int(sys.argv[-1].partition('=')[2]);"


def _start(script, *flags, **environment):
    command = [*LOCAL, *flags, "--", sys.executable, "-c", _ME + script]
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def _run(script, *flags, **environment):
    process = _start(script, *flags, **environment)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def test_each_process_has_its_number_its_devices_and_the_users_flags():
    script = "print(*sys.argv[1:]); print(os.environ['XLA_FLAGS'], os.environ['JAX_PLATFORMS'])"
    status, said = _run(script, "--processes=2", "--devices-per-process=3", XLA_FLAGS="--xla_a=1")
    assert status == 0
    lines = said.splitlines()
    assert len(lines) == 4
    for index in (0, 1):
        first, second = (line for line in lines if line.startswith(f"[{index}] "))
        coordinator, *rest = first.split()[1:]
        assert coordinator.startswith("--coordinator=127.0.0.1:")
        assert rest == ["--processes=2", f"--process-id={index}"]
        assert second.endswith(" --xla_a=1 --xla_force_host_platform_device_count=3 cpu")


def test_a_killed_process_is_named_with_its_signal_and_who_will_not_end_is_killed():
    script = """
if me == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)"""
    status, said = _run(script, "--processes=2", "--grace=0.5")
    assert status == 128 + signal.SIGKILL
    assert "grain-jax local: process 1 was ended by signal 9 (SIGKILL); ending the others" in said
    assert "grain-jax local: process 0 did not end within 0.5 s; killing it" in said


def test_the_one_that_died_is_named_not_those_that_jax_then_aborts():
    abort, fault = -signal.SIGABRT, -signal.SIGSEGV
    assert local._first_failure([abort, fault, abort], []) == 1
    assert local._first_failure([abort, None, 0], []) == 0
    assert local._first_failure([abort, 75], []) is None
    assert local._first_failure([130, 130], []) == 0
    assert local._first_failure([130, 130], [signal.SIGINT]) is None


_SAVES = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
print('up', flush=True)
time.sleep(60)"""


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_are_passed_on_and_the_status_is_theirs(number, status):
    process = _start(_SAVES, "--processes=2")
    for _ in range(2):
        assert "up" in process.stderr.readline()
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status
    assert "grain-jax local:" not in said


def test_where_the_launcher_is_killed_the_processes_save_and_end(tmp_path):
    script = f"""
def save(*_):
    open(f"{tmp_path}/{{me}}", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("training", flush=True)
time.sleep(60)"""
    process = _start(script, "--processes=2")
    ready = 0
    while ready < 2:
        ready += "training" in process.stderr.readline()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
