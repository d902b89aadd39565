"""Record sets and annotation files of strangers, and two builds at once: a named fault or one line."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
from etils import epath

from grain_jax.core import errors
from grain_jax.data import sources, staging
from grain_jax.data.sources import base, tfds
from grain_jax.input_pipeline import record_files
from tests import record_sets
from tests.data import test_sources
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


def test_entities_of_a_stranger(tmp_path):
    options = test_sources.flickr30k_entities_sample(tmp_path)
    sentences, boxes = tmp_path / "Sentences", tmp_path / "Annotations"
    many = "".join(f"[/EN#1/x a{n}] " for n in range(3000))
    box = "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
    objects = f"<object><name>1</name><bndbox>{box}</bndbox></object>"
    (sentences / "3.txt").write_text(many)
    (boxes / "3.xml").write_text(f"<annotation>{objects * 500}</annotation>")
    (sentences / "4.txt").write_text("[/EN#1/" * 9000)
    lol = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    (boxes / "5.xml").write_text(f'<!DOCTYPE x [<!ENTITY l0 "lol">{lol}]><x>&l9;</x>')
    (boxes / "6.xml").write_text('<?xml version="1.0" encoding="nonsense"?><a/>')
    (boxes / "7.xml").write_text("<a>" * 15_000)
    items = test_sources.read_all("flickr30k_entities", options)
    faults = {item.image: item.detail for item in items if isinstance(item, sources.Fault)}
    assert sorted(faults) == ["3.jpg", "5.jpg", "6.jpg", "7.jpg"]
    assert "at most 10,000 boxes" in faults["3.jpg"]


@pytest.mark.parametrize(
    "content, line",
    [
        (b"\x80\x02]r\x00\x00\x00\x7f.", "got no images"),  # the index of 2 billion objects
        (b"(" * 200_000 + b"l" * 200_000 + b".", "Expected `object`, got `array`|nested too deep"),
        (b"cos\nsystem\n(S'true'\ntR.", "no pickle of plain values .it wants os.system"),
    ],
)
def test_pickles_of_a_stranger(tmp_path, content, line):
    options = test_sources.refcoco_sample(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(content)
    with pytest.raises(errors.UserError, match=line) as error:
        test_sources.read_all("refcoco", options)
    assert "\n" not in str(error.value)


def test_a_saved_folder_names_no_file_elsewhere(tmp_path):
    options = test_sources.hf_dataset_sample(tmp_path)
    (tmp_path / "saved/train/state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    with pytest.raises(errors.UserError, match="got the name '../x', expected a path below"):
        sources.shards("hf-dataset", options)
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["../.."]}')
    with pytest.raises(errors.UserError, match="expected a path below"):
        sources.shards("hf-dataset", options._replace(split="../.."))
