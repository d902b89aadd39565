"""A run whose records, workdir, checkpoints and metrics are all in an object store, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import record_sets, storage_emulator
from tests.paths import ROOT

# Needs google-cloud-storage and gcsfs (the extra gcs): python -m pytest -m slow tests/test_remote.py
pytestmark = pytest.mark.slow
COMMITTED = "run/checkpoints/4/commit_success.txt"
COMMAND = [sys.executable, "-m", "grain_jax.train", "--config=tests/run_config.py"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """The store, with a record set in it, and the environment of a process that uses it."""
    pytest.importorskip("google.cloud.storage")  # by which Orbax lists what is in a bucket
    folder = tmp_path_factory.mktemp("storage")
    record_sets.write_annotations(folder / "in", 40)
    assert record_sets.build_set(folder / "in", folder / "out", "--num-shards=4") == 0
    (folder / "tls").mkdir()
    with storage_emulator.serve(folder / "tls") as (store, environment):
        for file in (folder / "out").rglob("*"):
            if file.is_file():
                store.write("bucket", f"data/{file.relative_to(folder / 'out')}", file.read_bytes())
        yield store, {**os.environ, **environment}


def _lines(store):
    text = store.blobs["bucket", "run/metrics.jsonl"].data.decode()
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_on_an_object_store_is_killed_and_resumed(storage):
    store, environment = storage
    command = [*COMMAND, "--workdir=gs://bucket/run", "--config.input.source=records"]
    command += ["--config.input.data_dir=gs://bucket/data", "--config.input.name=tiny_set"]
    command += ["--config.profile_start=2", "--config.profile_steps=1"]

    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as first:
        while COMMITTED not in store.names("bucket") and first.poll() is None:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        message = first.stderr.read().decode()
    assert first.returncode == -signal.SIGKILL, message
    assert [line["step"] for line in _lines(store)][:4] == [1, 2, 3, 4]

    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "resumed at step" in second.stderr
    assert [line["step"] for line in _lines(store)] == list(range(1, 11))
    names = store.names("bucket", "run/")
    steps = [f"checkpoints/{step}/commit_success.txt" for step in (8, 10)]
    profile = "tensorboard/plugins/profile/step_2/process_00000.xplane.pb"
    expected = {f"run/{name}" for name in ("config.json", "report.html", profile, *steps)}
    assert expected <= set(names), expected - set(names)
    left = ("checkpoints/4/", "trainer.lock")
    assert not [name for name in names if any(part in name for part in left)]
    assert len([name for name in names if "/events.out" in name]) == 2  # one a start
