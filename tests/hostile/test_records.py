"""Record sets that name code or files elsewhere, and two builds at once: one line, status 2."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
from etils import epath

from grain_jax.data import staging
from grain_jax.data.sources import base, tfds
from grain_jax.input_pipeline import record_files
from tests import record_sets
from tests.hostile import cases
from tests.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    record_sets.write_annotations(folder / "in", 18)
    assert record_sets.build_set(folder / "in", folder / "out", "--num-shards=4") == 0
    return folder


def test_a_set_names_no_code(built, tmp_path):
    """TFDS imports the modules of the classes that features.json names."""
    shutil.copytree(built / "out", tmp_path / "out")
    path = tmp_path / "out/tiny_set/1.0.0/features.json"
    content = json.loads(path.read_text()) | {"pythonClassName": "antigravity.Fly"}
    path.write_text(json.dumps(content))
    read = lambda _: tfds.Tfds().shards(base.Options(str(path.parent))) and None
    cases.check(cases.run(read, []), f"{path}: names the class 'antigravity.Fly', expected TFDS's own")
    # Training asks TFDS for nothing, and reads no file elsewhere.
    path = path.with_name(record_files.DIGEST_FILE)
    path.write_text(path.read_text().replace('"tiny_set-train', '"/etc/tiny_set-train'))
    (record_set,) = record_files.find(record_sets.config(tmp_path / "out"))
    assert all(epath.Path(shard.path).parent == path.parent for shard in record_set.shards)


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
        cases.check(second, f"{target}: in use by another process; wait for it")
        first.send_signal(signal.SIGKILL)
    mark = target.parent / "incomplete.lock_1.0.0"
    assert mark.exists()  # what a killed build leaves locks nobody out
    for _ in range(2):
        with staging.locked(target), staging.locked(target.parent / "1.0.1"):
            with pytest.raises(staging.BusyError, match="in use by another process"):
                with staging.locked(target):
                    pass
    assert not target.parent.exists()
