"""Embeddings of a record set beside its records: the texts, the join of batches, what is missing or of others."""

import dataclasses
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grain_jax import inference
from grain_jax.core import errors
from grain_jax.data.embed import __main__ as command
from grain_jax.data.embed import embeddings, stored
from grain_jax.input_pipeline import records
from tests import record_sets
from tests.embedded import read

pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")  # TFDS with protobuf 6

COUNT, SIZE = 16, 64
FIELDS = ("teacher_image", "teacher_captions", "teacher_descriptions")
WITHOUT = dict.fromkeys(FIELDS)


def embed(folder, name, *words):
    source = folder / "sets" / "tiny_set"
    given = [str(source), "--checkpoint=aviary-tiny", f"--output={folder / name}", *words]
    assert command.main(given) == 0
    return folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a record set of images of the model's size, and its embeddings in both formats."""
    folder = tmp_path_factory.mktemp("stored")
    record_sets.write_annotations(folder / "in", COUNT, size=(SIZE, SIZE))
    assert record_sets.build_set(folder / "in", folder / "sets", "--num-shards=8") == 0
    embed(folder, "parquet", "--texts", "--shard-size=6")
    embed(folder, "npy", "--texts", "--shard-size=6", "--format=npy", "--store=float32")
    return folder


@pytest.fixture(scope="module")
def batches(made):
    """Three batches."""
    return record_sets.take(config(made), 3)


@pytest.fixture(scope="module")
def vectors():
    """The embedding of each text, by the model."""
    texts = sorted({text for number in range(COUNT) for text in texts_of(number)})
    return dict(zip(texts, inference.load("aviary-tiny", "float32").encode_text(texts)))


def config(folder, kind="embeddings", path="parquet", **inputs):
    found = record_sets.config(folder / "sets", size=SIZE, **{"pack_rows": 8, **inputs})
    teacher = dataclasses.replace(found.teacher, kind=kind, path=str(folder / path))
    return dataclasses.replace(found, teacher=teacher)


def texts_of(number):
    line = record_sets.annotation(number, (SIZE, SIZE))
    regions = [region["description"] for region in line["regions"]]
    return [line["caption"], *line["captions"], line["synthetic_caption"], *regions]


def test_texts_are_embedded_beside_their_images(made, vectors):
    model = inference.load("aviary-tiny", "float32")
    rows = read(made / "parquet")
    assert embeddings.read_settings(made / "parquet").logit_scale == model.logit_scale
    assert len(rows) == COUNT and len({row["path"] for row in rows}) == COUNT
    for row in rows:
        texts = texts_of(int(row["id"][2:]))
        assert row["text_digests"] == [embeddings.text_digest(text) for text in texts]
        np.testing.assert_allclose(row["text_embed"], [vectors[x] for x in texts], atol=1e-6)
    files = sorted((made / "npy" / "text_emb").iterdir())
    flat = np.concatenate([row["text_embed"] for row in rows])
    np.testing.assert_array_equal(np.concatenate([np.load(file) for file in files]), flat)


def test_a_folder_of_images_has_no_texts(made, capsys):
    given = [str(made / "in"), "--checkpoint=aviary-tiny", "--texts", f"--output={made / 'none'}"]
    (made / "in" / "A.jsonl").rename(made / "A.jsonl")
    assert command.main(given) == 2
    (made / "A.jsonl").rename(made / "in" / "A.jsonl")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"--texts: got {made / 'in'}, expected it with a source with captions"


@pytest.mark.parametrize("path", ("parquet", "npy"))
def test_the_batches_hold_what_the_model_gives(made, vectors, path):
    """Also where a group overflows and regions are dropped."""
    model = inference.load("aviary-tiny", "float32")
    given: Any = dict(captions_per_image=2, lanes=2, pack_group=4, pack_rows=1)
    plain = record_sets.take(config(made, "none", **given), 3)
    joined = record_sets.take(config(made, path=path, **given), 3)
    dropped = 0
    for before, batch in zip(plain, joined, strict=True):
        record_sets.assert_batches_equal(batch._replace(**WITHOUT), before)
        np.testing.assert_allclose(batch.teacher_image, model.encode_image(batch.image), atol=1e-6)
        image_texts = [texts_of(number) for number in record_sets.numbers(batch)]
        dropped += int(batch.texts_dropped.sum())
        of_web = [[vectors[text] for text in texts[:2]] for texts in image_texts]
        synthetic = [vectors[texts[2]] for texts in image_texts]
        np.testing.assert_allclose(batch.teacher_captions[:, 1], synthetic, atol=1e-6)
        nearest = [
            np.abs(web - x).max(1).min() for web, x in zip(of_web, batch.teacher_captions[:, 0])
        ]
        assert max(nearest) < 1e-6
        for texts, mask, found in zip(
            image_texts, batch.region_mask, batch.teacher_descriptions, strict=True
        ):
            best = texts[3:][::-1]  # later regions have higher scores
            wanted = np.zeros_like(found)
            if mask.any():
                wanted[mask] = [vectors[best[i]] for i in np.flatnonzero(mask)]
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert dropped


def test_lanes_and_a_later_step_hold_the_same(made, batches):
    parts = [
        record_sets.take(config(made), 2, lanes=lanes, start_step=1) for lanes in ([0, 2], [1, 3])
    ]
    for at, lanes in enumerate(([0, 2], [1, 3])):
        rows = np.concatenate([np.arange(2 * lane, 2 * lane + 2) for lane in lanes])
        for step in (1, 2):
            for name in FIELDS:
                got = getattr(parts[at][step - 1], name)
                np.testing.assert_array_equal(got, getattr(batches[step], name)[rows])


def test_a_mixture_has_a_folder_for_each_set(made, batches, tmp_path):
    shutil.copytree(made / "npy", tmp_path / "both" / "tiny_set")
    entry = dict(name="tiny_set", data_dir=str(made / "sets"), weight=1.0)
    c = record_sets.config("", name="", size=SIZE, pack_rows=8, datasets=[entry])
    teacher = dataclasses.replace(c.teacher, kind="embeddings", path=str(tmp_path / "both"))
    (got,) = record_sets.take(dataclasses.replace(c, teacher=teacher), 1)
    record_sets.assert_batches_equal(got, batches[0])


def test_a_record_without_an_embedding_is_said_before_the_first_batch(made, monkeypatch):
    found = stored._parts

    def holed(*given):
        first, *rest = found(*given)
        return [first._replace(rows=first.rows - 2), *rest]

    monkeypatch.setattr(stored, "_parts", holed)
    with pytest.raises(errors.UserError) as error:
        records.check(config(made))
    assert str(error.value) == (
        f"{made / 'parquet'}: 2 records of 'tiny_set' (train) have no embedding (faults.jsonl says why); expected those of"
        " grain-jax embed over this record set, without faults"
    )


@pytest.mark.parametrize("path", ("parquet", "npy"))
def test_texts_that_are_not_those_of_their_embeddings_are_a_line(made, path, tmp_path):
    """A text moves from a record to the next one; of arrays, the last text is lost."""
    held = shutil.copytree(made / path, tmp_path / path)
    settings = embeddings.read_settings(held)
    file = sorted((held / settings.data).iterdir())[0]
    table = pq.read_table(file)
    lists = table["text_digests"].to_pylist()
    if path == "parquet":
        lists[1].insert(0, lists[0].pop())
    else:
        lists[-1].pop()
    at = table.schema.get_field_index("text_digests")
    kind = table.schema.field(at)
    notes = {k: v for k, v in pq.read_metadata(file).metadata.items() if k != b"ARROW:schema"}
    changed = table.set_column(at, kind, pa.array(lists, kind.type))
    plain = dict(compression="none", use_dictionary=False)
    pq.write_table(changed.replace_schema_metadata(notes), file, **plain)
    with pytest.raises(errors.UserError, match="damaged .its texts are not those of their emb"):
        record_sets.take(config(tmp_path, path=path, data_dir=str(made / "sets")), 2)


def test_a_text_without_an_embedding_is_named(made, monkeypatch):
    real = embeddings.text_digest
    monkeypatch.setattr(embeddings, "text_digest", lambda text: real(text + "."))
    with pytest.raises(errors.UserError, match="record .* has no embedding of its text '.* of"):
        record_sets.take(config(made), 1)


def test_embeddings_of_others_are_refused(made, tmp_path):
    c = config(made)
    record_sets.write_annotations(tmp_path / "in", COUNT + 1, size=(SIZE, SIZE))
    assert record_sets.build_set(tmp_path / "in", tmp_path / "sets", "--num-shards=8") == 0
    other = dataclasses.replace(
        c, input=dataclasses.replace(c.input, data_dir=str(tmp_path / "sets"))
    )
    with pytest.raises(errors.UserError, match="got embeddings of another record set than"):
        records.check(other)
    held = shutil.copytree(made / "parquet", tmp_path / "held")
    next((held / "data").iterdir()).unlink()
    teacher = dataclasses.replace(c.teacher, path=str(held))
    with pytest.raises(errors.UserError, match="got 2 of 3 files, expected all; give the command"):
        records.check(dataclasses.replace(c, teacher=teacher))
    assert stored.digest(made / "parquet") != stored.digest(made / "npy")
