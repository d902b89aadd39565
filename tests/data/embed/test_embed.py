"""grain-jax embed: every kind of source, one vector an image as Predictor's, faults, stops and resumes."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pyarrow.dataset
import pyarrow.parquet
import pytest

from grain_jax import inference
from grain_jax.core import errors
from grain_jax.data.embed import __main__ as command
from grain_jax.data.embed import embeddings, pipeline, search
from grain_jax.runtime import processes
from tests import perturbed, record_sets
from tests.embedded import go, job_of, read, settings, stand_in, write_tars
from tests.paths import ROOT

COUNT = 11


@pytest.fixture(scope="module")
def model():
    return inference.load("aviary-tiny", "float32")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with COUNT images and their A.jsonl; some lie in a sub-folder."""
    folder = tmp_path_factory.mktemp("images")
    lines = record_sets.write_annotations(folder, COUNT, size=(40, 24))
    (folder / "sub").mkdir()
    for line in lines[:3]:
        (folder / line["image"]).rename(folder / "sub" / line["image"])
        line["image"] = f"sub/{line['image']}"
    (folder / "A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def expected(model, images):
    """Number of an image -> (image_embed, region_embed, boxes_xyxy)."""
    names = [line["image"] for line in lines_of(images / "A.jsonl")]
    embed, regions = model.encode_image_and_regions(PIL.Image.open(images / name) for name in names)
    return list(zip(embed, regions.embed, regions.boxes_xyxy))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*words):
    return command.main(list(map(str, words)))


def embed(source, folder, *words):
    return run(source, "--checkpoint=aviary-tiny", f"--output={folder}", *words)


def number_of(row):
    return int("".join(filter(str.isdigit, row["path"].rpartition("/")[2])))


@pytest.mark.parametrize("kind", ["folder", "tars", "annotations", "records"])
def test_every_source_has_the_vectors_of_predictor(
    kind, images, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words, source = ["--shard-size=4"], os.path.relpath(images)  # relative paths
    if kind == "tars":
        write_tars(images, tmp_path / "tars")
        source = "tars"
    elif kind == "annotations":
        words.append(f"--images={source}")
        (tmp_path / "A.jsonl").write_bytes((images / "A.jsonl").read_bytes())
        source = "A.jsonl"
    elif kind == "records":
        assert record_sets.build_set(images, "records", "--num-shards=1") == 0
        source, words = "records/tiny_set", [*words, "--split=train"]
    assert embed(source, "out", *words) == 0
    rows = read(tmp_path / "out")
    files = 2 if kind == "tars" else 3
    assert f"out: {COUNT} images in {files} files; {COUNT} of them now" in capsys.readouterr().out
    assert len(rows) == COUNT
    for position, row in enumerate(rows):
        number = int(row["id"].removeprefix("id")) if "id" in row["id"] else number_of(row)
        image_embed, region_embed, boxes_xyxy = expected[number]
        assert (row["width"], row["height"]) == (40, 24)
        np.testing.assert_allclose(row["image_embed"], image_embed, atol=1e-6)
        np.testing.assert_allclose(row["region_embed"], region_embed, atol=1e-6)
        np.testing.assert_allclose(row["boxes_xyxy"], boxes_xyxy, atol=1e-6)
        if kind == "folder":  # by name, sub-folders in their place
            assert number == [*range(3, COUNT), *range(3)][position]
            assert row["path"] == f"{'sub/' if number < 3 else ''}{number:05d}.png" == row["id"]
        elif kind == "tars":
            assert row["path"] == f"{'a' if number < 3 else 'b'}/{number:05d}.png"
        elif kind == "annotations":
            assert row["id"] == f"id{position}"
        else:
            assert row["path"].startswith("train/0000") and row["id"].startswith("id")
    assert {row["id"] for row in rows} and len({row["id"] for row in rows}) == COUNT
    # Relative paths were noted from the root: the same source from elsewhere is the same.
    monkeypatch.chdir("/")
    words = [f"--images={images}" if word.startswith("--images") else word for word in words]
    source = images if kind == "folder" else tmp_path / source
    assert embed(source, tmp_path / "out", *words) == 0
    assert "; 0 of them now" in capsys.readouterr().out


def test_float16_and_the_card(images, expected, tmp_path, capsys):
    assert embed(images, tmp_path / "out", "--store=float16") == 0
    table = pyarrow.dataset.dataset(tmp_path / "out" / "data").to_table()
    assert str(table.schema.field("image_embed").type) == "fixed_size_list<element: halffloat>[64]"
    stored = table["image_embed"].combine_chunks().flatten().to_numpy().reshape(COUNT, -1)
    wanted = np.stack([expected[n][0] for n in [*range(3, COUNT), *range(3)]])
    np.testing.assert_array_equal(stored, wanted.astype(np.float16))
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("# Embeddings of 11 images", "`float16[64]`", "aviary-tiny", "`boxes_xyxy`"):
        assert said in card
    (tmp_path / "out" / "data" / "part-00000-of-00001.parquet.0a1b.new").write_bytes(b"of a kill")
    code, found = card.split("```python\n")[1].split("```")[0], {}
    exec(code.replace('"data"', repr(str(tmp_path / "out/data"))), found)
    np.testing.assert_array_equal(found["image_embed"], stored)


# The pipeline with a stand-in for the model.


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of 30 tiny images."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(30):
        record_sets.picture(number, (8, 8)).save(folder / f"{number:05d}.png")
    return folder


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(pipeline.predictor_lib, "MAX_BATCH", 1)
    monkeypatch.setattr(pipeline.jax, "local_device_count", lambda: 3)


def assert_whole(folder, count=30):
    rows = read(folder)
    assert [number_of(row) for row in rows] == list(range(count))
    for row in rows:
        assert row["image_embed"] == [number_of(row), 0, 7]
        assert len(row["region_embed"]) == len(row["boxes_xyxy"]) == 2 + number_of(row) % 2


def test_processes_divide_the_parts(many, tmp_path, monkeypatch, small_batches):
    job, seen = job_of(many, tmp_path), []
    for index in range(3):
        monkeypatch.setattr(processes, "process_info", lambda index=index: (index, 3))
        mine = list(processes.share(len(job.parts)))
        assert go(job, mine) == sum(job.parts[i]["size"] for i in mine) > 0
        seen += mine
    assert seen == list(range(8))
    assert_whole(tmp_path)


@pytest.mark.parametrize("stop", [0, 2, 9])
def test_a_stop_at_any_batch_and_a_resume(stop, many, tmp_path, small_batches):
    calls = itertools.count()

    def failing(batch):
        if next(calls) >= stop:
            raise RuntimeError("stopped")
        return stand_in(batch)

    job = job_of(many, tmp_path)
    with pytest.raises(RuntimeError, match="stopped"):
        go(job, encode=failing)
    done = job.finished()
    assert len(done) <= stop  # a part has at least as many images as a batch
    times = {i: (tmp_path / "data" / job.name(i)).stat().st_mtime_ns for i in done}
    # Other numbers of processes go on: the second half first, then the rest.
    assert go(job_of(many, tmp_path), list(range(4, 8))) == 14
    go(job_of(many, tmp_path))
    for index, old in times.items():
        if index < 4:
            assert (tmp_path / "data" / job.name(index)).stat().st_mtime_ns == old
    assert_whole(tmp_path)


def test_a_damaged_file_is_made_again(many, tmp_path, capsys):
    job = job_of(many, tmp_path)
    go(job)
    for index, content in ((2, lambda old: old[: len(old) // 2]), (5, lambda old: b"")):
        path = tmp_path / "data" / job.name(index)
        path.write_bytes(content(path.read_bytes()))
    assert go(job) == 8
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("damaged" in line and "made again" in line for line in said)
    assert_whole(tmp_path)
    (tmp_path / "data" / "other.parquet").write_bytes(b"")
    with pytest.raises(embeddings.EmbeddingsError, match="other.parquet: expected files of this"):
        job.finished()


def test_what_changed_is_refused(many, images, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for path in sorted(many.glob("*.png"))[:3]:
        shutil.copy(path, source)
    out = tmp_path / "out"
    assert embed(source, out) == 0
    for words, said in (
        ([source, out, "--store=float16"], 'begun with store "float32", got "float16"'),
        ([source, out, "--shard-size=2"], "begun with shard_size 4096, got 2"),
        ([source, out, "--dtype=bfloat16"], "begun with dtype"),
        ([images / "A.jsonl", out], "begun with source"),
    ):
        capsys.readouterr()
        assert embed(*words) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    said = json.loads((out / "settings.json").read_text())
    said["model"]["params"] = "0"
    (out / "settings.json").write_text(json.dumps(said))
    assert embed(source, out) == 2
    assert "begun with model aviary-tiny (parameters 0)" in capsys.readouterr().err
    record_sets.picture(77).save(source / "new.png")
    assert embed(source, out) == 2
    assert "its images are not those that" in capsys.readouterr().err
    assert len((out / "images.jsonl").read_text().splitlines()) == 3


def test_faults_are_counted_named_and_at_most_one_in_a_hundred(many, tmp_path, capsys):
    source = shutil.copytree(many, tmp_path / "source")
    bad = ["00003.png", "00020.png"]
    for name in bad:
        (source / name).write_bytes(b"no image")
    out = tmp_path / "out"
    job = job_of(source, out)
    with pytest.raises(pipeline.EmbedError, match="00020.png: unreadable: .*--max-faults"):
        go(job, most_faults=1)
    with pytest.raises(pipeline.EmbedError):  # on resume, too
        go(job, most_faults=1)
    assert [line["path"] for line in lines_of(out / "faults.jsonl")] == bad
    assert sorted(job.finished()) == [0, 1, 2, 3, 4]  # what came before it
    assert go(job, most_faults=2) == 9
    assert [number_of(row) for row in read(out)] == [n for n in range(30) if n not in (3, 20)]
    parts_done = job.finished()
    assert [len(parts_done[i].faults) for i in range(8)] == [1, 0, 0, 0, 0, 1, 0, 0]
    fault = parts_done[0].faults[0]
    assert fault["cause"] == "unreadable" and "no known image format" in fault["detail"]
    # The command itself: 2 of 30 are more than 1%, and not more than 10%.
    whole = tmp_path / "whole"
    assert embed(source, whole, "--max-faults=0.1") == 0
    assert "28 images (2 left out: faults.jsonl)" in capsys.readouterr().out
    assert embed(source, whole) == 2  # all is done, and the faults are too many still
    err = capsys.readouterr().err
    assert "faults.jsonl: 2 unreadable\n" in err
    assert "2 of 30 images have a fault, more than --max-faults 0.01" in err
    lines = lines_of(whole / "faults.jsonl")
    assert [line["path"] for line in lines] == bad
    assert lines[0].keys() == {"path", "cause", "detail", "file"}


def test_a_damaged_tar_is_a_fault(images, tmp_path):
    write_tars(images, tmp_path / "tars")
    tar = tmp_path / "tars" / "b.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    job = job_of(tmp_path / "tars", tmp_path / "out")
    go(job)
    (fault,) = job.finished()[1].faults
    assert (fault["path"], fault["cause"]) == ("b.tar", "damaged shard")
    assert [number_of(row) for row in read(tmp_path / "out")][:3] == [0, 1, 2]


@pytest.mark.parametrize(
    "make, words, said",
    [
        (lambda p: p.mkdir(), [], "got no images there, expected a folder of images"),
        (lambda p: None, [], "no such file or folder, expected a folder of images"),
        (lambda p: p.write_text(""), [], "got no images there"),
        (lambda p: p.mkdir(), ["--images=x"], "--images x: got"),
        (lambda p: p.mkdir(), ["--split=train"], "--split train: got"),
    ],
)
def test_a_source_without_images_is_one_line(make, words, said, tmp_path, capsys):
    make(tmp_path / "source")
    assert embed(tmp_path / "source", tmp_path / "out", *words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_without_pyarrow_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert embed(tmp_path, tmp_path / "out") == 2
    assert "pip install 'grain_jax[embed]'" in capsys.readouterr().err


def test_given_boxes_are_those_of_the_box_head(model, images, expected, tmp_path, capsys):
    assert embed(images / "A.jsonl", tmp_path / "out", "--boxes=given") == 0
    lines = lines_of(images / "A.jsonl")
    pictures = [PIL.Image.open(images / line["image"]) for line in lines]
    boxes = [np.array([r["box"] for r in x["regions"]]).reshape(-1, 4) for x in lines]
    boxes = [x / [40, 24, 40, 24] for x in boxes]
    embeds = model.encode_boxes(pictures, boxes)
    rows = read(tmp_path / "out")
    assert [len(row["boxes_xyxy"]) for row in rows] == [number % 4 for number in range(COUNT)]
    for row, own, embed_, (whole, *_) in zip(rows, boxes, embeds, expected, strict=True):
        np.testing.assert_allclose(np.reshape(row["boxes_xyxy"], (-1, 4)), own, atol=1e-6)
        np.testing.assert_allclose(np.reshape(row["region_embed"], embed_.shape), embed_, atol=3e-6)
        np.testing.assert_allclose(row["image_embed"], whole, atol=3e-6)
    hits = search.search(search.Index(tmp_path / "out"), embeds[7][2:], top=2)[0]
    assert (hits[0].id, hits[0].region) == ("id7", 2) and hits[0].score > 0.9999
    capsys.readouterr()
    assert embed(images, tmp_path / "no", "--boxes=given") == 2
    err = capsys.readouterr().err
    assert "--boxes given: got" in err and err.count("\n") == 1


class TwoTowers:
    has_regions = False

    def __init__(self, value):
        self.value = value

    def encode_image(self, pixels):
        return np.full((len(pixels), 3), self.value, np.float32)


def test_a_model_without_regions_has_no_columns_of_them(many, tmp_path):
    job = job_of(many, tmp_path)
    job = job._replace(settings=settings(len(job.parts), regions=""))
    go(job, encode=pipeline.encoder(TwoTowers(0.5)))
    rows = read(tmp_path)
    assert [row["image_embed"] for row in rows] == [[0.5] * 3] * 30
    assert list(rows[0]) == ["id", "path", "width", "height", "image_embed"]


def test_images_in_their_own_shape():
    model = perturbed.tiny(image__depth=1, text__depth=1, decoder=None, image__pool="map")
    predictor = inference.Predictor(model, perturbed.params(model), sequence_length=9)
    encode, resize = pipeline.encoder(predictor), command._resize(predictor)
    pictures = [PIL.Image.new("RGB", size, "teal") for size in ((30, 90), (64, 40))]
    ready = [pipeline.Ready(str(i), "", *x.size, None, resize(x)) for i, x in enumerate(pictures)]
    found = [one.image_embed for one in encode(ready)]
    np.testing.assert_allclose(found, predictor.encode_image(pictures), atol=1e-6)


def test_numbers_that_are_not_finite_end_it(many, tmp_path):
    job = job_of(many, tmp_path)
    with pytest.raises(errors.UserError, match="not finite"):
        go(job, encode=pipeline.encoder(TwoTowers(np.nan)))
    assert job.finished() == {}


@pytest.mark.slow
def test_killed_three_times_by_two_processes_then_one(tmp_path):
    """SIGKILL at arbitrary moments; the number of processes changes in between."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    rng = np.random.default_rng(0)
    for number in range(600):
        PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(
            source / f"{number:05d}.png"
        )
    words = f"embed {source} --checkpoint aviary-tiny --output {out} --shard-size 16".split()
    two = [sys.executable, "-m", "grain_jax", "local", "--processes=2", "--devices-per-process=1"]
    counts = []
    for command_line in ([*two, "--", "grain-jax", *words], [sys.executable, "-m", "grain_jax", *words], [*two, "--", "grain-jax", *words]):  # fmt: skip
        process = subprocess.Popen(command_line, cwd=ROOT, start_new_session=True)
        before = len(list(out.glob("data/*.parquet")))
        while process.poll() is None and len(list(out.glob("data/*.parquet"))) < before + 5:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        counts.append(len(list(out.glob("data/*.parquet"))))
    assert counts[0] < counts[1] < counts[2] < 38, counts
    done = subprocess.run([*two, "--", "grain-jax", *words], cwd=ROOT)
    assert done.returncode == 0
    assert [number_of(row) for row in read(out)] == list(range(600))
