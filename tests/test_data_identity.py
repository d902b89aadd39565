"""A run knows its record sets: a resume over another one is an error, wherever the same one lies."""

import json
import pathlib
import shutil

import jax
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from grain_jax.checkpoint import files, states
from grain_jax.core import errors
from grain_jax.data import digest
from grain_jax.input_pipeline import record_files, records
from grain_jax.train import run as run_training
from tests import record_sets, tiny


def _build(folder, output, *, shards=4):
    shutil.rmtree(output, ignore_errors=True)
    assert record_sets.build_set(folder, output, f"--num-shards={shards}", "--encoding=png") == 0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    record_sets.write_annotations(folder, 16)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_device():
    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: device)
        yield


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


def test_the_digest_is_of_what_the_records_hold(pictures, built, tmp_path):
    written = json.loads((built / "tiny_set/1.0.0" / record_files.DIGEST_FILE).read_text())
    builder = tfds.builder_from_directory(built / "tiny_set/1.0.0")
    stored = []
    decoders = {"image": tfds.decode.SkipDecoding()}
    for item in tfds.as_numpy(builder.as_dataset(split="train", decoders=decoders)):
        regions = item["regions"]
        stored.append(
            {
                "id": item["id"].decode(),
                "image": item["image"],
                "captions": [text.decode() for text in item["captions"]],
                "synthetic_caption": item["synthetic_caption"].decode(),
                "regions": [
                    dict(bbox=box, description=text.decode(), score=score)
                    for box, text, score in zip(
                        regions["bbox"], regions["description"], regions["score"], strict=True
                    )
                ],
            }
        )
    of_stored = digest.Digest()
    assert len(list(of_stored.counting(stored))) == 16
    sizes = [path.stat().st_size for path in sorted(built.rglob("*.tfrecord-*"))]
    expected = {"digest": of_stored.hex(), "shard_lengths": [4] * 4, "shard_bytes": sizes}
    digests = written["train"].pop("shard_digests")
    assert written == {"train": expected} and len({len(x) for x in digests}) == 1
    assert _identity(built)["digest"] == of_stored.hex()


@pytest.mark.parametrize("beside", [True, False])
def test_the_same_set_elsewhere_is_the_same_and_another_is_not(pictures, built, tmp_path, beside):
    def identity(output):
        if not beside:  # a set that data.build has not written
            (output / "tiny_set/1.0.0" / record_files.DIGEST_FILE).unlink(missing_ok=True)
        return _identity(output)

    here = identity(built)
    assert here["digest_of"] == ("records" if beside else "files")
    shutil.copytree(built, tmp_path / "moved é ü")
    assert identity(tmp_path / "moved é ü") == here
    _build(pictures, built)  # other bytes, the same records
    assert identity(built) == here
    longer = _edit(pictures, tmp_path, synthetic_caption="another text, of another length")
    _build(longer, tmp_path / "other")
    other = identity(tmp_path / "other")
    assert other["digest"] != here["digest"]
    assert other | {"digest": ""} == here | {"digest": ""}


def test_a_digest_of_other_shards_is_not_taken(pictures, built):
    path = built / "tiny_set/1.0.0" / record_files.DIGEST_FILE
    old = path.read_text()
    _build(pictures, built, shards=2)
    path.write_text(old)
    assert _identity(built)["digest_of"] == "files"


def test_of_many_files_a_fixed_number_is_looked_into(built, monkeypatch):
    shards = sorted((built / "tiny_set/1.0.0").glob("*tfrecord*"))
    looked = []
    monkeypatch.setattr(record_files, "_LOOKED_INTO", 2)
    real = records.tf.data.TFRecordDataset
    monkeypatch.setattr(
        records.tf.data, "TFRecordDataset", lambda path: looked.append(path) or real(path)
    )
    record_files._digest_of_files([record_files.epath.Path(path) for path in shards])
    assert sorted(looked) == [str(shards[0]), str(shards[2])]


def _config(output, **overrides):
    source = dict(input__source="records", input__data_dir=str(output), input__name="tiny_set")
    source |= dict(total_steps=2, checkpoint_every=1)
    return tiny.config(**tiny.SHALLOW, **source, **overrides)


@pytest.fixture(scope="module")
def run(built_there, tmp_path_factory):
    """(workdir of 2 steps, its data)."""
    place = tmp_path_factory.mktemp("run")
    shutil.copytree(built_there, place / "data")
    run_training.train(_config(place / "data"), place / "workdir")
    return place / "workdir", place / "data"


def _restore(workdir, config):
    """What the trainer does at its start; (lines that it says, the identities)."""
    said = []
    data = records.identities(config)
    stored = files.read_items(workdir / "checkpoints/2").data
    states.check_same_data(2, stored, data, said.append)
    return said, data


def test_a_run_keeps_what_its_data_is_and_goes_on_where_it_is_moved(run, tmp_path):
    workdir, output = run
    shutil.copytree(output, tmp_path / "moved")
    said, data = _restore(workdir, _config(tmp_path / "moved"))
    assert said == [] and files.read_items(workdir / "checkpoints/2").data == data


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
    with pytest.raises(files.CheckpointError, match="records 16 -> 14, content. Put"):
        _restore(workdir, _config(tmp_path / "data"))
    edited = _edit(pictures, tmp_path, caption="edited")
    _build(edited, tmp_path / "data")
    with pytest.raises(files.CheckpointError, match="trained on: content. Put that one back"):
        run_training.train(_config(tmp_path / "data"), workdir)


def _change_texts(output):
    """Other texts of the same length in all records but the first of each shard; all sizes and checksums are right."""
    for path in sorted(output.rglob("*.tfrecord-*")):
        first, *others = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in [first, *(one.replace(b"text", b"TEXT") for one in others)]:
                writer.write(record)


@pytest.mark.parametrize("beside", [True, False])
def test_a_resume_over_shards_that_were_changed_in_place_ends(run, built, tmp_path, beside):
    workdir = tmp_path / "workdir"
    if beside:
        shutil.copytree(run[0], workdir)
    else:
        (built / "tiny_set/1.0.0" / record_files.DIGEST_FILE).unlink()
        run_training.train(_config(built), workdir)
    assert len(sorted(workdir.glob("shards/*"))) == (0 if beside else 4)
    shutil.rmtree(workdir / "checkpoints/2")
    shutil.copytree(built, tmp_path / "moved é")
    _change_texts(built)
    with pytest.raises(errors.UserError) as caught:
        run_training.train(_config(built), workdir)
    line = str(caught.value)
    assert line.startswith(f"{built}/tiny_set/1.0.0/tiny_set-train.tfrecord-0000")
    what = "grain-jax build wrote (digest.json)" if beside else "this run read there before"
    assert f"-of-00004: not the records that {what}: put the shard back" in line
    assert "\n" not in line and files.finished_steps(workdir) == [1]
    if not beside:
        run_training.train(_config(tmp_path / "moved é"), workdir)
        assert files.finished_steps(workdir) == [1, 2]


@pytest.mark.parametrize("content", ["{", "[]", '{"test": {}}', '{"train": 3}'])
def test_a_digest_that_data_build_has_not_written_is_one_line(built, content):
    (built / "tiny_set/1.0.0" / record_files.DIGEST_FILE).write_text(content)
    with pytest.raises(record_files.DataError, match="not what grain-jax build writes") as caught:
        _identity(built)
    assert "\n" not in str(caught.value)


def test_another_kind_of_digest_is_not_compared_and_says_so(run, tmp_path):
    workdir, output = run
    shutil.copytree(output, tmp_path / "bare")
    (tmp_path / "bare/tiny_set/1.0.0" / record_files.DIGEST_FILE).unlink()
    (line,), _ = _restore(workdir, _config(tmp_path / "bare"))
    assert line.endswith("the content cannot be compared, a digest of records with one of files")
