"""A tiny run that is ended at seeded moments, again and again, has the metrics of one left alone."""

import os
import random
import re
import signal
import subprocess
import time

import pytest

from tests import runs
from tests.paths import ROOT

pytestmark = pytest.mark.slow
PATIENCE = 300  # seconds that a process may take to get somewhere, or to end
KILL, TERM = signal.SIGKILL, signal.SIGTERM
FAULTS = [(KILL, "step"), (KILL, "save"), (KILL, "start"), (TERM, "save")]
STEPS = 15 * len(FAULTS) + 30
KEYS = dict(total_steps=STEPS, checkpoint_every=5, checkpoint_keep=3)


def start(workdir, *, processes=0, **changes):
    """The command of the run in that workdir; the same at every restart."""
    command = runs.command(workdir, changes | runs.SMALL, processes=processes)
    environment = runs.on_one_device(workdir.parent / "compiled")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(workdir, **changes):
    process = start(workdir, **changes)
    text = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, text
    return text


def number_of_lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def unfinished(workdir):
    """The checkpoints that a save has begun."""
    return set((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def kept(workdir):
    paths = (workdir / "checkpoints").iterdir()
    return sorted(int(path.name) for path in paths if path.name.isdigit())


def strike(workdir, number, moment, rng):
    """Starts the run and ends it in its start, after some steps, or in a save."""
    process = start(workdir, **KEYS)
    lines, before = number_of_lines(workdir), unfinished(workdir)
    lines += 0 if moment == "start" else rng.randint(1, 9)
    deadline = time.monotonic() + PATIENCE
    start_ends = time.monotonic() + rng.uniform(0.1, 6)
    reached = {
        "start": lambda: time.monotonic() > start_ends,  # it imports or compiles
        "step": lambda: number_of_lines(workdir) >= lines,
        "save": lambda: number_of_lines(workdir) >= lines and unfinished(workdir) - before,
    }[moment]
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, "no fault could happen"
        time.sleep(0.001)
    process.send_signal(number)
    text = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == (-KILL if number == KILL else 75), text
    assert unfinished(workdir) - before or (number, moment) != (KILL, "save")


def test_a_run_that_is_ended_again_and_again_has_the_metrics_of_one_left_alone(tmp_path):
    finish(tmp_path / "left_alone", **KEYS)
    rng = random.Random(0)
    for number, moment in FAULTS:
        strike(tmp_path / "ended", number, moment, rng)
    assert number_of_lines(tmp_path / "ended") < STEPS  # not over before the last fault
    finish(tmp_path / "ended", **KEYS)
    assert runs.lines(tmp_path / "ended") == runs.lines(tmp_path / "left_alone")
    assert kept(tmp_path / "ended") == kept(tmp_path / "left_alone")


def test_of_two_at_once_one_trains_as_if_alone(tmp_path):
    finish(tmp_path / "alone", total_steps=30)
    workdir = tmp_path / "shared"
    pair = [start(workdir, total_steps=30) for _ in range(2)]
    texts = [process.communicate()[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 2], "\n".join(texts)
    refused, first = sorted(pair, key=lambda process: -process.returncode)
    line = texts[pair.index(refused)].strip()
    assert line.startswith(f"{workdir}: process {first.pid} on ") and "\n" not in line
    assert runs.lines(workdir) == runs.lines(tmp_path / "alone")
    assert kept(workdir) == [28, 30] and not (workdir / "trainer.lock").exists()


def test_where_one_of_two_processes_is_killed_the_other_ends_and_the_same_command_resumes(tmp_path):
    keys = KEYS | dict(total_steps=30, processes=2)
    finish(tmp_path / "left_alone", **keys)
    workdir = tmp_path / "killed"
    for victim in (1, 0):
        process, lines = start(workdir, **keys), number_of_lines(workdir)
        deadline = time.monotonic() + PATIENCE
        while number_of_lines(workdir) < lines + 8:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        ps = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)]
        children = subprocess.check_output(ps, text=True)
        (pid,) = (line.split()[0] for line in children.splitlines() if f"--process-id={victim}" in line)
        os.kill(int(pid), KILL)
        text = process.communicate(timeout=90)[1]  # --heartbeat-seconds is 100
        assert process.returncode == 128 + KILL, text
        ended = f"process {victim} was ended by signal 9 (SIGKILL); ending the others"
        assert [f"grain-jax local: {ended}"] == re.findall("^grain-jax local: .*", text, re.M)
    newest = kept(workdir)[-1]
    assert f"resumed at step {newest}" in finish(workdir, **keys)
    assert runs.lines(workdir) == runs.lines(tmp_path / "left_alone")
    assert kept(workdir) == kept(tmp_path / "left_alone")
