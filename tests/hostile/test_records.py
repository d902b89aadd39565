"""Damaged record sets, and disks that are full, read-only or shared: one line that names the file, status 2."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from grain_jax.data import staging
from grain_jax.input_pipeline import records
from tests import record_sets
from tests.hostile import cases
from tests.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")
SHARDS = 4


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    record_sets.write_annotations(folder / "in", 18)
    assert record_sets.build_set(folder / "in", folder / "out", f"--num-shards={SHARDS}") == 0
    return folder


def _edit(name, change):
    """Changes a JSON file of the set."""

    def edit(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def _shard(folder, number):
    return sorted(folder.glob("tiny_set-train*"))[number]


def _swap(folder):
    first, second = _shard(folder, 0), _shard(folder, 1)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def _as_fifo(folder):
    path = _shard(folder, 2)
    path.unlink()
    os.mkfifo(path)


def _lengths(values):
    return _edit("dataset_info.json", lambda x: x["splits"][0].update(shardLengths=values))


INFO, FEATURES = "dataset_info.json", "features.json"
ROWS = [
    ("info cut off", _cut(INFO), INFO),
    ("info deep", _write(INFO, b"[" * 200_000), INFO),
    ("info an object of nothing", _write(INFO, b"{}"), "dataset_info.json or features.json|no split"),
    ("lengths too few", _lengths(["9"]), "train.*00000-of-00001: the shard is gone"),
    ("lengths below zero", _lengths(["-5", "5", "9", "9"]), "-5 records"),
    ("lengths beyond the files", _lengths(["5", "5", "4", str(10**12)]), f"cannot be the {10**12} records"),
    ("features cut off", _cut(FEATURES), FEATURES),
    ("features of nothing", _write(FEATURES, b"{}"), FEATURES),
    ("features of another module", _edit(FEATURES, lambda x: x.update(pythonClassName="antigravity.Fly")), "names the class 'antigravity.Fly', expected TFDS's own"),
    ("a digest cut off", _cut("digest.json"), "digest.json: not what grain-jax build writes"),
    ("a digest of a number", _write("digest.json", b'{"train": 3}'), "digest.json: not what grain-jax build writes"),
    ("a FIFO as shard", _as_fifo, "train.*: no regular file; expected a shard"),
    ("a file elsewhere", _edit(INFO, lambda x: x["splits"][0].update(filepathTemplate="/etc/{SPLIT}-{SHARD_X_OF_Y}")), "names the file /etc/train-00000"),
    ("two shards swapped", _swap, "00000-of-00004: got .* shards have each other's names"),
]  # fmt: skip


@pytest.mark.parametrize("name,damage,expected", ROWS, ids=[row[0] for row in ROWS])
def test_a_damaged_set(built, tmp_path, name, damage, expected):
    shutil.copytree(built / "out", tmp_path / "out")
    damage(tmp_path / "out" / "tiny_set" / "1.0.0")
    config = record_sets.config(tmp_path / "out")

    def run(_):
        records.identities(config)

    cases.check(cases.run(run, []), f"{tmp_path}.*({expected}).*")


def test_a_set_in_order_and_one_without_a_digest_are_read(built, tmp_path):
    config = record_sets.config(built / "out")
    assert records.num_examples(config) == 18
    shutil.copytree(built / "out", tmp_path / "out")
    (tmp_path / "out" / "tiny_set" / "1.0.0" / "digest.json").unlink()
    assert records.num_examples(record_sets.config(tmp_path / "out")) == 18


def test_a_file_in_the_place_of_the_output(built, tmp_path):
    (tmp_path / "out").write_text("mine")
    outcome = cases.run(lambda _: record_sets.build_set(built / "in", tmp_path / "out"), [])
    cases.check(outcome, f"{tmp_path}/out.*: (Not a directory|File exists); no set was changed")
    assert (tmp_path / "out").read_text() == "mine"


HOLD = """
import sys, time
from grain_jax.data import staging
with staging.locked(staging.epath.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_two_builds_at_once(built, tmp_path):
    target = staging.epath.Path(tmp_path / "out" / "tiny_set" / "1.0.0")
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"locked\n"
        second = cases.run(lambda _: record_sets.build_set(built / "in", tmp_path / "out"), [])
        cases.check(second, f"{target}: in use by process {first.pid} on .*; wait for it")
        first.send_signal(signal.SIGKILL)
    mark = target.parent / "incomplete.lock_1.0.0"
    assert mark.exists()  # what a killed build leaves locks nobody out
    for _ in range(2):
        with staging.locked(target), staging.locked(target.parent / "1.0.1"):
            with pytest.raises(staging.BusyError, match=f"process {os.getpid()} on "):
                with staging.locked(target):
                    pass
    assert not target.parent.exists()
