"""Search over a folder of embeddings: against brute force, blocks of every size, FAISS, other models, damage."""

import numpy as np
import PIL.Image
import pytest

import grain_jax
from grain_jax.core import regular_file
from grain_jax.data.embed import embeddings, output, search
from grain_jax.runtime import saved_model
from tests import embedded

D, COUNT = 64, 90


@pytest.fixture(scope="module")
def model():
    return grain_jax.load("aviary-tiny")


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def write(folder, model, stored="float32", regions=True):
    """An index of COUNT images in three files, with random vectors; image i has 1 to 4 regions."""
    rng = np.random.default_rng(3)
    image_embed = unit(rng.standard_normal((COUNT, D)))
    counts = 1 + np.arange(COUNT) % 4
    region_embed = [unit(rng.standard_normal((n, D))) for n in counts]
    boxes = [rng.uniform(size=(n, 4)).astype(np.float32) for n in counts]
    folder = output.epath.Path(folder)
    digests = embeddings.Digests(**saved_model.model_digests(model.model, model.params))
    made_of = {"checkpoint": "aviary-tiny", "model": digests, "store": stored}
    settings = embedded.settings(3, D, "queries" if regions else "", **made_of)
    output.agree(folder, settings)
    job = output.Output(folder, settings, [embedded.piece(str(i), 30) for i in range(3)])
    job.finished()
    for part in range(3):
        writer = output.Writer(job, part)
        for i in range(30 * part, 30 * part + 30):
            row = output.EmbeddedImage(
                f"id{i}", f"{i}.png", 10, 20, image_embed[i], region_embed[i], boxes[i]
            )
            writer.add(row)
        writer.close()
    return image_embed, region_embed, boxes


def brute_force(queries, of_image, top):
    """(image, its best vector, cosine) of the best images, by float64; `of_image` are lists of vectors."""
    out = []
    for query in queries.astype(np.float64):
        scores = [vectors.astype(np.float64) @ query for vectors in of_image]
        order = sorted(range(len(scores)), key=lambda i: -scores[i].max())[:top]
        out.append([(i, int(scores[i].argmax()), scores[i].max()) for i in order])
    return out


@pytest.fixture(scope="module")
def opened(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("index")
    written = write(folder, model)
    return search.Index(folder), written


@pytest.mark.parametrize("faiss", [False, True])
@pytest.mark.parametrize("by", ["regions", "images"])
@pytest.mark.parametrize("block_rows, top", [(7, 7), (24, 200), (1000, 1)])
def test_it_finds_what_brute_force_finds(opened, by, block_rows, top, faiss, monkeypatch):
    index, (image_embed, region_embed, boxes) = opened
    monkeypatch.setattr(search, "_ROWS", block_rows)
    queries = unit(np.random.default_rng(1).standard_normal((3, D)))
    of_image = region_embed if by == "regions" else image_embed[:, None]
    found = search.search(index, queries, top=top, by=by, faiss=faiss)
    for hits, expected in zip(found, brute_force(queries, of_image, top), strict=True):
        assert len(hits) == min(top, COUNT)
        for hit, (image, best, score) in zip(hits, expected, strict=True):
            found_at = hit.id, hit.path, hit.width, hit.height
            assert found_at == (f"id{image}", f"{image}.png", 10, 20)
            assert hit.score == pytest.approx(score, abs=2e-6)
            np.testing.assert_array_equal(hit.boxes_xyxy, boxes[image])
            assert hit.source == embedded.piece(str(image // 30), 30)
            if by == "regions":
                assert hit.region == best
                np.testing.assert_array_equal(hit.box_xyxy, boxes[image][best])
            else:
                assert hit.region is None and hit.box_xyxy is None


def test_equal_scores_come_in_the_order_of_the_index(opened):
    index, _ = opened
    hits = search.search(index, np.zeros((1, D), np.float32), top=5)[0]
    assert [(hit.path, hit.region) for hit in hits] == [(f"{i}.png", 0) for i in range(5)]


def test_texts_and_images_are_those_of_the_model(opened, model):
    index, _ = opened
    texts = ["a long orange beak", "a spiky crest"]
    paths = lambda found: [hit.path for hit in found]
    vectors = search.search(index, model.encode_text(texts), top=4)
    assert paths(search.search(index, texts, top=4)[1]) == paths(vectors[1])  # loads the model
    assert paths(search.search(index, texts[0], model=model)[0][:4]) == paths(vectors[0])
    image = PIL.Image.new("RGB", (30, 20), "teal")
    of_image = search.search(index, [image], top=3, model=model)
    expected = search.search(index, model.encode_image([image]), top=3, by="images")
    assert paths(of_image[0]) == paths(expected[0])
    assert of_image[0][0].region is None
    assert search.search(index, np.zeros((0, D))) == []


def test_float16_without_regions(tmp_path, model):
    image_embed, _, _ = write(tmp_path, model, "float16", regions=False)
    index = search.Index(tmp_path)
    hits = search.search(index, image_embed[[40]], top=2)[0]
    assert (len(index), hits[0].path, hits[0].region) == (COUNT, "40.png", None)
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    with pytest.raises(search.SearchError, match="has no regions"):
        search.search(index, image_embed[:1], by="regions")


def test_what_does_not_fit_is_one_line(opened, model, tmp_path):
    index, _ = opened
    fault = lambda said: pytest.raises(search.SearchError, match=said)
    vector = np.zeros((1, D), np.float32)
    with fault(r"got \[1, 3\], expected \[T, 64\]"):
        search.search(index, np.zeros((1, 3)))
    with fault("by: got 'rows'"):
        search.search(index, vector, by="rows")
    with fault("top: got 0"):
        search.search(index, vector, top=0)
    params = {**model.params, "logit_scale": model.params["logit_scale"] + 1}
    other = type(model)(model.model, params, folder=model.folder)
    with fault("made by another model: aviary-tiny"):
        search.search(index, "a beak", model=other)
    with pytest.raises(regular_file.FileError, match="settings.json: no such file, expected sett"):
        search.Index(tmp_path)
    write(tmp_path / "x", model)
    path = tmp_path / "x" / "data" / "part-00001-of-00003.parquet"
    path.unlink()
    unfinished = search.Index(tmp_path / "x")
    assert (unfinished.missing, len(unfinished)) == (1, 60)
    last = path.with_name("part-00002-of-00003.parquet")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 255  # in a page, whose checksum then differs
    last.write_bytes(content)
    with pytest.raises(embeddings.EmbeddingsError, match="part-00002-of-00003.parquet: damaged"):
        search.search(search.Index(tmp_path / "x"), vector)
    (tmp_path / "x" / "settings.json").write_text("{")
    with pytest.raises(regular_file.FileError, match="settings.json: "):
        search.Index(tmp_path / "x")
