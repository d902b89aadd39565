"""A run knows its record sets: a resume over another one is an error, wherever the same one lies."""

import json
import pathlib
import shutil

import pytest
import tensorflow as tf

from grain_jax.checkpoint import files, states
from grain_jax.core import errors
from grain_jax.input_pipeline import record_files, records
from grain_jax.train import run as run_training
from tests import record_sets, tiny

pytestmark = pytest.mark.long


def _build(folder, output, *, shards=4):
    shutil.rmtree(output, ignore_errors=True)
    assert record_sets.build_set(folder, output, f"--num-shards={shards}", "--encoding=png") == 0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    record_sets.write_annotations(folder, 16)
    return folder


@pytest.fixture(scope="module")
def built_there(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "data"
    _build(pictures, folder)
    return folder


@pytest.fixture
def built(built_there, tmp_path):
    return pathlib.Path(shutil.copytree(built_there, tmp_path / "data"))


def _edit(pictures, tmp_path, **changes):
    """A copy of the images' folder whose line 5 has other values."""
    folder = tmp_path / "edited"
    shutil.copytree(pictures, folder)
    lines = [json.loads(line) for line in (folder / "A.jsonl").read_text().splitlines()]
    lines[5] |= changes
    (folder / "A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _identity(output):
    return records.identities(record_sets.config(output))[0]


def test_the_digests_are_those_of_the_shards(built):
    folder = built / "tiny_set/1.0.0"
    shards = sorted(folder.glob("*.tfrecord-*"))
    written = json.loads((folder / record_files.DIGEST_FILE).read_text())["train"]
    for entry, path in zip(written["shards"], shards, strict=True):
        expected = [path.name, 4, path.stat().st_size]
        assert [entry["name"], entry["records"], entry["bytes"]] == expected
    assert len({entry["digest"] for entry in written["shards"]}) == 4
    expected = dict(name="tiny_set", split="train", shard_lengths=[4] * 4, digest=written["digest"])
    assert _identity(built) == expected


def test_the_same_set_elsewhere_is_the_same_and_another_is_not(pictures, built, tmp_path):
    here = _identity(built)
    shutil.copytree(built, tmp_path / "moved é ü")
    assert _identity(tmp_path / "moved é ü") == here
    _build(pictures, built)
    assert _identity(built) == here
    _build(_edit(pictures, tmp_path, synthetic_caption="another text"), tmp_path / "other")
    other = _identity(tmp_path / "other")
    assert other["digest"] != here["digest"]
    assert other | {"digest": ""} == here | {"digest": ""}


def _config(output, **overrides):
    source = dict(input__source="records", input__data_dir=str(output), input__name="tiny_set")
    source |= dict(total_steps=2, checkpoint_every=1)
    return tiny.config(**tiny.SHALLOW, **source, **overrides)


@pytest.fixture(scope="module")
def run(built_there, tmp_path_factory, one_device):
    """(workdir of 2 steps, its data)."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(built_there, folder / "data")
    run_training.train(_config(folder / "data"), folder / "workdir")
    return folder / "workdir", folder / "data"


def _restore(workdir, config):
    """Compares the data as the trainer does at its start; returns the identities."""
    data = records.identities(config)
    states.check_same_data(2, files.read_items(workdir / "checkpoints/2").data, data)
    return data


def test_a_resume_over_a_rebuilt_set_says_what_changed(run, pictures, tmp_path):
    workdir, _ = run
    _build(pictures, tmp_path / "two", shards=2)
    with pytest.raises(files.CheckpointError) as caught:
        _restore(workdir, _config(tmp_path / "two", input__lanes=2))
    assert str(caught.value) == (
        "tiny_set (train): not the set that checkpoint 2 was trained on: shards 4 -> 2. Put that one back"
        " (input.data_dir) to go on, or start anew with another --workdir"
    )
    fewer = tmp_path / "fewer"
    record_sets.write_annotations(fewer, 14)
    _build(fewer, tmp_path / "data")
    with pytest.raises(files.CheckpointError, match="records 16 -> 14. Put"):
        _restore(workdir, _config(tmp_path / "data"))
    edited = _edit(pictures, tmp_path, caption="edited")
    _build(edited, tmp_path / "data")
    with pytest.raises(files.CheckpointError, match="trained on: content. Put that one back"):
        run_training.train(_config(tmp_path / "data"), workdir)


def test_a_resume_over_shards_that_were_changed_in_place_ends(run, built, tmp_path):
    workdir = tmp_path / "workdir"
    shutil.copytree(run[0], workdir)
    shutil.rmtree(workdir / "checkpoints/2")
    for path in sorted(built.rglob("*.tfrecord-*")):  # sizes and checksums stay right
        first, *others = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
        record_sets.write_shard(path, [first, *(record.replace(b"text", b"TEXT") for record in others)])
    with pytest.raises(errors.UserError) as caught:
        run_training.train(_config(built), workdir)
    line = str(caught.value)
    assert line.startswith(f"{built}/tiny_set/1.0.0/tiny_set-train.tfrecord-0000")
    assert "-of-00004: not the records that grain-jax build wrote (digest.json): put the" in line
    assert "\n" not in line and files.finished_steps(workdir) == [1]
