"""What ended the trainer in a traceback, in C++, in a hang or in silence: one line and a status each."""

import dataclasses
import shutil
import socket

import jax
import pytest

from grain_jax import config as config_lib
from grain_jax import train
from grain_jax.core import errors
from grain_jax.runtime import lock, metrics_writer
from tests import tiny
from tests.hostile import cases

FLAGS = [  # arguments, the line
    (
        ["--workdir", "--config.total_steps=3"],
        "--workdir: has no value, but the flag --config.total",
    ),
    (["--config.total_steps=3", "--workdir"], "--workdir: has no value; expected --workdir DIR"),
    (["-workdir", "-config.total_steps=3"], "--workdir: has no value, but the flag --config.total"),
    (["--workdir=x", "--process_id", "--processes=2"], "--process-id: has no value, but the flag"),
]


@pytest.mark.parametrize("arguments,line", FLAGS)
def test_flags(arguments, line):
    outcome = cases.run(train.main, ["--config", "tests/run_config.py", *arguments])
    cases.check(outcome, line)


_HUGE = 10**9
CONFIGS = [  # key, value, the line
    ("optim__learning_rate", float("nan"), "got nan, expected a finite number"),
    ("optim__learning_rate", float("inf"), "got inf, expected a finite number"),
    ("model__image__width", _HUGE, "got 1000000000, expected 1 to 131072"),
    ("batch_size", 10**30, "got 1000000000000000000000000000000, expected 1 to 2147483647"),
    (
        "seed",
        10**30,
        "got 1000000000000000000000000000000, expected -9223372036854775808 to 9223372036854775807",
    ),
]


@pytest.mark.parametrize("key,value,line", CONFIGS)
def test_configs(key, value, line):
    outcome = cases.run(lambda _: config_lib.from_dict(tiny.dictionary(**{key: value})) and 0, [])
    cases.check(outcome, f"^{key.replace('__', '.')}: {line}")


def _file(workdir):
    workdir.write_text("x")


def _under_a_file(workdir):
    workdir.parent.write_text("x")


def _trained(workdir):
    """By process 1, which lives."""
    workdir.mkdir(parents=True)
    holder = dataclasses.replace(lock._myself(), pid=1, started=lock._started(1))
    (workdir / lock.FILE).write_bytes(lock._bytes(holder))


WORKDIRS = [
    (_file, "run: got a file, expected a folder"),
    (_under_a_file, "run: got Not a directory, expected a folder"),
    (_trained, f"process 1 on {socket.gethostname()} trains there, since .* expected no other"),
]


@pytest.mark.parametrize("prepare,line", WORKDIRS)
def test_workdirs(tmp_path, prepare, line):
    workdir = tmp_path / "runs" / "run"
    if prepare is _file:
        workdir.parent.mkdir()
    prepare(workdir)
    cases.check(cases.run(lambda _: train.train(tiny.config(), workdir), []), line)


def test_hostile_metrics_are_left_out_and_a_workdir_that_is_removed_is_a_line(
    tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_bytes(b'{"step": "x"}\n\xff\x00\n{"step": 1e400}\n')
    write = metrics_writer.MetricsWriter.write

    def remove(self, step, metrics):
        if step == 2:
            shutil.rmtree(workdir)
        write(self, step, metrics)

    monkeypatch.setattr(metrics_writer.MetricsWriter, "write", remove)
    monkeypatch.setattr(cases, "SECONDS", 300)  # it compiles
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: device)
    # As in test_data_identity.py.
    config = tiny.config(**tiny.SHALLOW, total_steps=2, checkpoint_every=0)
    outcome = cases.run(lambda _: train.train(config, workdir), [])
    cases.check(outcome, "run: the folder was removed", errors.StorageFault.status)
    cases.check(outcome, r"metrics.jsonl, line 1: got .* 3 of 3 lines do not count", 1)
    assert not workdir.exists()
