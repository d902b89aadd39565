"""grain-jax embed --format npy: the layout of clip-retrieval, stops, damage, and the example of FAISS in docs/embed.md."""

import os
import re
import subprocess
import sys
import types
from typing import Any

import faiss  # noqa: F401  before the example: SWIG warns at the first import
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest

from grain_jax import inference
from grain_jax.core import errors
from grain_jax.data.embed import __main__ as command
from grain_jax.data.embed import embeddings, output, search
from tests import record_sets
from tests.embedded import go, job_of, settings
from tests.paths import ROOT

COUNT = 11


def run(*words):
    return command.main([*map(str, words), "--checkpoint=aviary-tiny"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(images with their A.jsonl, a folder of --format npy, the same as Parquet)."""
    images = tmp_path_factory.mktemp("images")
    lines = record_sets.write_annotations(images, COUNT, size=(40, 24))
    folders = images / "npy", images / "parquet"
    assert run(images / "A.jsonl", f"--output={folders[0]}", "--format=npy", "--shard-size=1") == 0
    assert run(images / "A.jsonl", f"--output={folders[1]}", "--store=float16") == 0
    return images, lines, *folders


def arrays(folder, name):
    files = sorted(folder.glob(f"{name}/*.npy"))
    return [np.load(file) for file in files], [file.name for file in files]


def metadata(folder):
    files = sorted(folder.glob("metadata/*.parquet"))
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def test_the_layout_of_clip_retrieval(made):
    images, lines, folder, _ = made
    model = inference.load("aviary-tiny", "float32")
    paths = [images / line["image"] for line in lines]
    image, regions = model.encode_image_and_regions(map(PIL.Image.open, paths))
    parts, names = arrays(folder, "img_emb")
    # A file of one image each here: as many digits as the number of files has, so that names sort.
    assert names[:2] == ["img_emb_00.npy", "img_emb_01.npy"] and len(names) == len(parts) == COUNT
    stored = np.concatenate(parts)
    assert stored.dtype == np.float16 and stored.flags.c_contiguous
    np.testing.assert_allclose(stored.astype(np.float32), image, atol=6e-4)
    of_regions, names = arrays(folder, "region_emb")
    assert names[-1] == "region_emb_10.npy" and of_regions[0].dtype == np.float16
    flat = regions.embed.reshape(-1, image.shape[1])
    np.testing.assert_allclose(np.concatenate(of_regions).astype(np.float32), flat, atol=6e-4)
    rows = metadata(folder)
    assert list(rows[0])[:2] == ["image_path", "caption"]
    assert [row["image_path"] for row in rows] == [str(path) for path in paths]
    captions = [[line.get("caption"), *line.get("captions", ()), ""] for line in lines]
    assert [row["caption"] for row in rows] == [
        next(x for x in c if x is not None) for c in captions
    ]
    assert any(row["caption"] for row in rows) and {row["width"] for row in rows} == {40}
    np.testing.assert_allclose([x["boxes_xyxy"] for x in rows], regions.boxes_xyxy, atol=1e-6)
    card = (folder / "README.md").read_text()
    code, found = card.split("```python\n")[1].split("```")[0], {}
    exec(code.replace('"img_emb"', repr(str(folder / "img_emb"))), found)
    np.testing.assert_array_equal(found["image_embed"], stored)


def test_the_example_of_faiss_finds_what_search_finds(made, monkeypatch):
    images, _, folder, parquet = made
    (folder / "metadata" / "metadata_01.parquet.0a1b.new").write_bytes(b"left by a kill")
    text = (ROOT / "docs" / "embed.md").read_text()
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", text, re.S) if "import faiss" in x)
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, np.load(folder / "img_emb" / "img_emb_00.npy").shape[1]))
    query = (query / np.linalg.norm(query)).astype(np.float32)
    monkeypatch.chdir(images)
    os.symlink(folder, "embeddings")
    found: dict[str, Any] = {"model": types.SimpleNamespace(encode_text=lambda texts: query)}
    exec(code, found)
    hits = search.search(search.Index(parquet), query, by="images")[0]
    assert [x["id"] for x in found["found"]] == [hit.id for hit in hits]
    np.testing.assert_allclose(found["scores"][0], [hit.score for hit in hits], atol=1e-6)


def test_what_the_format_is_not(made, tmp_path, capsys):
    images, _, folder, parquet = made
    for words, said in (
        ([f"--output={folder}"], 'begun with store "float16", got "float32"'),
        ([f"--output={folder}", "--store=float16"], "begun with shard_size 1, got 4096"),
        ([f"--output={parquet}", "--format=npy"], 'begun with format "parquet", got "npy"'),
        ([f"--output={tmp_path}", "--dtype=float16"], "; of the files it is --store float16"),
    ):
        assert run(images / "A.jsonl", *words) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    with pytest.raises(embeddings.EmbeddingsError, match="has --format npy, expected parquet"):
        search.Index(folder)


# With a stand-in for the model.


@pytest.fixture
def job(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(10):
        record_sets.picture(number, (8, 8)).save(source / f"{number}.png")
    found = job_of(source, tmp_path / "out")
    digest = found.settings.source.digest
    made_of = settings(len(found.parts), digest=digest, format="npy", store="float16")
    (found.folder / embeddings.SETTINGS).unlink()
    output.agree(found.folder, made_of)
    return output.Output(found.folder, made_of, found.parts)


def assert_whole(folder):
    (image, _), (regions, _) = arrays(folder, "img_emb"), arrays(folder, "region_emb")
    image = np.concatenate(image)
    assert image.dtype == np.float16 and image[:, 0].tolist() == list(range(10))
    counts = [2 + number % 2 for number in range(10)]
    np.testing.assert_array_equal(np.concatenate(regions), np.repeat(image, counts, axis=0))
    rows = metadata(folder)
    assert [len(row["boxes_xyxy"]) for row in rows] == counts
    assert [row["id"] for row in rows] == [f"{number}.png" for number in range(10)]


def test_a_stop_between_the_files_of_a_part_and_a_resume(job, monkeypatch):
    write, written = output.atomic.write_bytes, []

    def stopped(path, content):
        if len(written) == 4:  # of a part the images and the regions are there, the rows are not
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output.atomic, "write_bytes", stopped)
        go(job)
    folders = [path.parent.name for path in written]
    assert folders == ["img_emb", "region_emb", "metadata", "img_emb"]
    assert sorted(job.finished()) == [0]
    assert go(job) == 6
    assert_whole(job.folder)


@pytest.mark.parametrize("name", ["img_emb/img_emb_1.npy", "region_emb/region_emb_2.npy"])
@pytest.mark.parametrize("damage", ["gone", "short", "long", "header"])
def test_a_damaged_array_is_made_again(name, damage, job, capsys):
    go(job)
    path = job.folder / name
    whole = path.read_bytes()
    changed = {"short": whole[:-1], "long": whole + b"0", "header": whole.replace(b"<f2", b"<i2")}
    path.unlink()
    if damage != "gone":
        path.write_bytes(changed[damage])
    number = int(name[-5])
    assert sorted(job.finished()) == [i for i in range(3) if i != number]
    err = capsys.readouterr().err
    assert f"metadata_{number}.parquet: damaged ({name} " in err and err.count("\n") == 1
    assert "made again now" in err
    assert go(job) == (2 if number == 2 else 4)
    assert_whole(job.folder)


def test_a_pipe_in_the_place_of_an_array_is_refused(job):
    path = job.folder / "img_emb" / "img_emb_0.npy"
    path.parent.mkdir()
    os.mkfifo(path)
    with pytest.raises(errors.UserError, match="img_emb_0.npy: got a folder, pipe or device"):
        go(job)
    path.unlink()
    go(job)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(errors.UserError, match="img_emb_0.npy: got a folder, pipe or device"):
        job.finished()


@pytest.mark.parametrize("name", ["img_emb/img_emb_3.npy", "region_emb/other.npy"])
def test_an_array_of_no_part_is_refused(name, job):
    path = job.folder / name
    path.parent.mkdir()
    np.save(path, np.ones((7, 3), np.float16))
    with pytest.raises(embeddings.EmbeddingsError, match=f"{name}: expected arrays of this job"):
        go(job)
    path.unlink()
    go(job)
    assert_whole(job.folder)


def test_files_need_no_pandas():
    code = """
import sys

class NotThere:
    def find_spec(self, name, path=None, target=None):
        if name == "pandas":
            raise ModuleNotFoundError("no pandas", name=name)

sys.meta_path.insert(0, NotThere())
import numpy as np
import pyarrow as pa
from grain_jax.data.embed import output
for store in (pa.float16(), pa.float32()):
    vectors = output._vectors(pa, np.ones((2, 3)), pa.list_(store, 3))
    assert vectors.type == pa.list_(store, 3) and vectors.flatten().to_numpy().sum() == 6
"""
    subprocess.run([sys.executable, "-c", code], check=True)
