"""grain-jax embed: every kind of source, the layout of clip-retrieval, faults, damage, stops and resumes."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import faiss  # noqa: F401  before the snippet: SWIG warns at the first import
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest

from grain_jax import inference
from grain_jax.core import errors
from grain_jax.data import job as jobs
from grain_jax.data import staging
from grain_jax.data.embed import __main__ as command
from grain_jax.data.embed import output, pipeline
from grain_jax.data.embed.arguments import Embed
from tests import record_sets
from tests.data import test_sources
from tests.paths import ROOT

COUNT = 11


@pytest.fixture(scope="module", autouse=True)
def model():
    """The commands of these tests load it once."""
    model = inference.load("aviary-tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "load", lambda *_, **__: model)
        yield model


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


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(model, images):
    """Number of an image -> (image_embed, region_embed, boxes_xyxy)."""
    names = [line["image"] for line in lines_of(images / "A.jsonl")]
    embed, regions = model.encode_image_and_regions(PIL.Image.open(images / name) for name in names)
    return list(zip(embed, regions.embed, regions.boxes_xyxy))


def embed(source, folder, *flags):
    flags = (source, "--checkpoint=aviary-tiny", f"--output={folder}", *flags)
    return command.main(list(map(str, flags)))


def array(folder, kind):
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{kind}/*.npy"))])


def read(folder):
    """The rows of the metadata, each with its embeddings."""
    files = sorted(folder.glob("metadata/*.parquet"))
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    regions = iter(array(folder, "region_emb"))
    for row, vector in zip(rows, array(folder, "img_emb"), strict=True):
        row |= {"image_embed": vector, "region_embed": [next(regions) for _ in row["boxes_xyxy"]]}
    assert next(regions, None) is None
    return rows


def number_of(row):
    return int("".join(filter(str.isdigit, row["image_path"].rpartition("/")[2])))


def write_tars(images, folder):
    """The images in two tars; the first has the images of the sub-folder."""
    for name, paths in (("b", images.glob("*.png")), ("a", (images / "sub").glob("*.png"))):
        members = [(x.name, x.read_bytes()) for x in sorted(paths) if not x.name.startswith(".")]
        test_sources.write_tar(folder / f"{name}.tar", members)


@pytest.mark.parametrize("kind", ["folder", "tars", "annotations"])
def test_every_source_has_the_vectors_of_predictor(kind, images, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags, source = ["--shard-size=4"], os.path.relpath(images)  # relative paths
    if kind == "tars":
        write_tars(images, tmp_path / "tars")
        source = "tars"
    elif kind == "annotations":
        flags.append(f"--images={source}")
        (tmp_path / "A.jsonl").write_bytes((images / "A.jsonl").read_bytes())
        source = "A.jsonl"
    assert embed(source, "out", *flags) == 0
    rows = read(tmp_path / "out")
    files = 2 if kind == "tars" else 3
    assert f"out: {COUNT} images in {files} files; {COUNT} of them now" in capsys.readouterr().out
    assert len({row["id"] for row in rows}) == len(rows) == COUNT
    for position, row in enumerate(rows):
        number = int(row["id"].removeprefix("id")) if "id" in row["id"] else number_of(row)
        image_embed, region_embed, boxes_xyxy = expected[number]
        assert (row["width"], row["height"]) == (40, 24)
        np.testing.assert_allclose(row["image_embed"], image_embed, atol=6e-4)
        np.testing.assert_allclose(row["region_embed"], region_embed, atol=6e-4)
        np.testing.assert_allclose(row["boxes_xyxy"], boxes_xyxy, atol=1e-6)
        name, path = f"{number:05d}.png", row["image_path"]
        below = f"{images}/{'sub/' if number < 3 else ''}{name}"
        if kind == "folder":  # by name, sub-folders in their place
            assert number == [*range(3, COUNT), *range(3)][position]
            assert path == below
        elif kind == "tars":
            assert path == f"{'a' if number < 3 else 'b'}/{name}"
        else:
            assert path == below and row["id"] == f"id{position}" and row["caption"]
    # Relative paths were noted from the root: the same source from elsewhere is the same.
    monkeypatch.chdir("/")
    flags = [f"--images={images}" if flag.startswith("--images") else flag for flag in flags]
    source = images if kind == "folder" else tmp_path / source
    assert embed(source, tmp_path / "out", *flags) == 0
    assert "; 0 of them now" in capsys.readouterr().out


def test_the_snippet_of_faiss_reads_the_layout_of_clip_retrieval(images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "embeddings"
    assert embed(images / "A.jsonl", out, "--shard-size=1") == 0
    # As many digits as the number of files has, so that names sort.
    for kind, ending in (("img_emb", "npy"), ("region_emb", "npy"), ("metadata", "parquet")):
        names = sorted(path.name for path in (out / kind).iterdir())
        assert names == [f"{kind}_{number:02d}.{ending}" for number in range(COUNT)]
    assert array(out, "img_emb").dtype == np.float16
    rows = read(out)
    query = rows[7]["region_embed"][2].astype(np.float32)
    text = (ROOT / "docs/howto/find_regions.md").read_text()
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", text, re.S) if "faiss" in x)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {"model": types.SimpleNamespace(encode_text=lambda texts: query[None])})
    best = capsys.readouterr().out.split(maxsplit=2)
    assert (float(best[0]), best[1]) == (pytest.approx(1, abs=6e-3), rows[7]["image_path"])


def test_faults_are_counted_and_another_begin_is_refused(images, tmp_path, capsys):
    source, out = shutil.copytree(images, tmp_path / "source"), tmp_path / "out"
    (source / "00005.png").write_bytes(b"no image")
    assert embed(source, out, "--max-faults=0.1") == 0
    assert "10 images (1 left out: faults.jsonl)" in capsys.readouterr().out
    assert embed(source, out) == 2  # all is done, and the faults are too many still
    err = capsys.readouterr().err
    assert "faults.jsonl: 1 unreadable\n" in err and "1 of 11 images" in err
    (fault,) = lines_of(out / "faults.jsonl")
    assert (fault["path"], fault["file"]) == ("00005.png", "metadata_0.parquet")
    assert [number_of(row) for row in read(out)] == [3, 4, 6, 7, 8, 9, 10, 0, 1, 2]

    note, refusals = out / "settings.json", []
    with staging.locked(jobs.Output(str(out)).path("faults.jsonl")):
        refusals.append((embed(source, out), "in use by another process; "))
    settings = note.read_text()
    note.write_text(re.sub('"params": "[^"]*"', '"params": "0"', settings))
    refusals.append((embed(source, out), 'with model {"params": "0"}, got {'))
    note.write_text(settings)
    (source / "00005.png").unlink()
    refusals.append((embed(source, out), 'with source {"image_list": '))
    for (status, line), err in zip(refusals, capsys.readouterr().err.splitlines(), strict=True):
        assert status == 2 and line in err


# The pipeline with a stand-in for the model.


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder of 30 tiny images, for batches of 3."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(30):
        record_sets.picture(number, (8, 8)).save(folder / f"{number:05d}.png")
    monkeypatch.setattr(pipeline.batches, "MAX_BATCH", 1)
    monkeypatch.setattr(pipeline.jax, "local_device_count", lambda: 3)
    return folder


def stand_in(batch):
    """A model whose vector is an image's first pixel; images have 2 or 3 regions."""
    out = []
    for row in batch:
        vector = row.pixels[0, 0].astype(np.float32)
        count = 2 + int(vector[0]) % 2
        regions = np.tile(vector, (count, 1)), np.full((count, 4), 0.5, np.float32)
        out.append(row._replace(image_embed=vector, region_embed=regions[0], boxes_xyxy=regions[1]))
    return out


def job_of(source, folder, regions=True):
    folder = jobs.Output(str(folder))
    args = Embed(source=str(source), checkpoint="", output="", shard_size=4)
    _, images, shards = command.find(args, folder)
    settings = {"embed_dim": 3, "regions": regions}
    return output.Embeddings(folder, settings, shards, images)


def go(job, mine=None, encode=stand_in):
    done = job.done()
    if mine is None:
        mine = [index for index in range(len(job.parts)) if index not in done]
    return pipeline.run(job, mine, encode, size=8, threads=2)


def assert_whole(folder):
    rows = read(folder)
    assert [number_of(row) for row in rows] == list(range(30))
    for row in rows:
        assert row["image_embed"].tolist() == [number_of(row), 0, 7]
        assert len(row["boxes_xyxy"]) == 2 + number_of(row) % 2


@pytest.mark.parametrize("stop", [0, 4])
def test_a_stop_at_any_batch_and_a_resume(stop, many, tmp_path):
    calls = itertools.count()

    def failing(batch):
        if next(calls) >= stop:
            raise RuntimeError("stopped")
        return stand_in(batch)

    job = job_of(many, tmp_path / "out")
    with pytest.raises(RuntimeError, match="stopped"):
        go(job, encode=failing)
    done = job.done()
    assert len(done) <= stop  # a part has at least as many images as a batch
    times = {i: os.stat(job.path("done", i)).st_mtime_ns for i in done}
    # Other numbers of processes go on: the second half first, then the rest.
    assert go(job_of(many, tmp_path / "out"), list(range(4, 8))) == 14
    go(job_of(many, tmp_path / "out"))
    assert all(os.stat(job.path("done", i)).st_mtime_ns == times[i] for i in done if i < 4)
    assert_whole(tmp_path / "out")


def test_a_damaged_part_is_made_again(many, tmp_path, capsys):
    job = job_of(many, tmp_path / "out")
    go(job)
    flipped = lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for kind, damage in (
        ("region_emb", lambda whole: whole[:-1]),
        *(("img_emb", None), ("done", None)),  # also a kill after the files were written
        *((kind, flipped) for kind in ("img_emb", "region_emb", "metadata", "done")),
    ):
        path = job.path(kind, 2)
        whole = path.read_bytes()
        path.unlink()
        if damage:
            path.write_bytes(damage(whole))
        assert sorted(job.done()) == [0, 1, 3, 4, 5, 6, 7]
        reason = "damaged, not what was written" if damage else "No such file or directory"
        named = capsys.readouterr().err.count(f"{path}: {reason}; its shard is made again")
        assert named == (damage is not None or kind != "done")
        assert go(job) == 4 and job.path(kind, 2).read_bytes() == whole
    assert_whole(tmp_path / "out")


def test_a_model_without_regions_has_no_files_of_them(many, tmp_path):
    def two_towers(value):
        encode = lambda pixels: np.full((len(pixels), 3), value, np.float32)
        return pipeline.encoder(types.SimpleNamespace(has_regions=False, encode_image=encode))

    job = job_of(many, tmp_path / "out", regions=False)
    with pytest.raises(errors.UserError, match="not finite"):
        go(job, encode=two_towers(np.nan))
    assert job.done() == {}
    go(job, encode=two_towers(0.5))
    assert array(tmp_path / "out", "img_emb").tolist() == [[0.5] * 3] * 30
    assert not (tmp_path / "out/region_emb").exists() and len(job.done()) == 8
    names = pyarrow.parquet.read_table(job.path("metadata", 0)).column_names
    assert names == ["image_path", "caption", "id", "width", "height"]


@pytest.mark.slow
def test_two_processes_are_killed_and_one_goes_on(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number in range(200):
        record_sets.picture(number, (32, 32)).save(source / f"{number:05d}.png")
    alone = [sys.executable, "-m", "grain_jax"]
    flags = ["embed", source, "--checkpoint=aviary-tiny", f"--output={out}", "--shard-size=8"]
    two = [*alone, "local", "--processes=2", "--devices-per-process=1", "--", "grain-jax", *flags]
    number_done = lambda: len(list(out.glob("done/*.record")))
    with subprocess.Popen(two, cwd=ROOT, start_new_session=True) as process:
        while process.poll() is None and number_done() < 5:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert 5 <= number_done() < 25
    assert subprocess.run([*alone, *flags], cwd=ROOT).returncode == 0
    assert [number_of(row) for row in read(out)] == list(range(200))
