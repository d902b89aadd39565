"""Images in their own shape, from records, data sources and random numbers, to the batch on the devices."""

import dataclasses
import io
import itertools
import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from jax.sharding import NamedSharding, PartitionSpec
from transformers.models.siglip2 import image_processing_siglip2

from grain_jax.core import errors, named, patches
from grain_jax.core.schema import Patches
from grain_jax.input_pipeline import (
    assemble,
    device,
    order,
    records,
    sources,
    synthetic,
    tokenizer,
    transforms,
)
from tests import record_sets, tiny
from tests.core import test_patches as golden

# TFDS 4.9.10 asks protobuf for a field's label; protobuf 6 has another name for it.
pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")
LENGTHS = (6, 12, 20)
SIZES = [(48, 16), (16, 40), (24, 24), (33, 17)]  # width, height


def config(output="", lengths=LENGTHS, **inputs):
    return record_sets.config(output, sequence_lengths=lengths, **inputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 images of four shapes, and records of them: as they are, inside 24 pixels, and squashed to 24 x 24."""
    folder = tmp_path_factory.mktemp("shapes")
    lines = record_sets.write_annotations(folder, 48, size=(16, 16))
    for number, line in enumerate(lines):
        width, height = SIZES[number % 4]
        pixels = golden.photograph(height, width, seed=number)
        PIL.Image.fromarray(pixels).save(folder / line["image"])
        for region in line["regions"]:
            region["box"] = [0, 0, width / 2, height]
    (folder / "A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, more in {
        "whole": [],
        "inside": ["--store-size=24", "--fit=inside"],
        "square": ["--store-size=24"],
    }.items():
        status = record_sets.build_set(folder, folder / "out", "--num-shards=8", *more, name=name)
        assert status == 0
    return folder


def identity(batch):
    """The caption's number of each image, which its id in the batch stands for."""
    return batch.caption_id[:, 0].tolist()


@pytest.mark.parametrize("length", golden.LENGTHS)
@pytest.mark.parametrize("shape", golden.SHAPES)
def test_the_pixels_of_training_are_those_of_siglip_2s_processor(shape, length):
    pixels = golden.photograph(*shape)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[file.getvalue()]))}
    record = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
    draws = tf.zeros(transforms.NUM_DRAWS)
    found = transforms.Transform(config(lengths=(length,)))(tf.constant(record), draws, length)
    expected, grid = golden.processed(image_processing_siglip2, pixels, length)
    np.testing.assert_array_equal(found["image"].grid, grid)
    assert np.abs(found["image"].pixels.numpy() - expected).max() <= 1


def test_grids_in_a_graph_are_those_of_numpy():
    """TensorFlow rewrites the arithmetic of a graph, and training is one; 784 patches of 25:8 are 49 rows of 16."""
    cases = [(h, 96, n) for h in (96, 300, 1200, 4704, 9000) for n in (49, 196, 784)]
    xp = tf.experimental.numpy

    @tf.function
    def graph(height, width, length):
        return patches.grid(tf.cast(height, tf.float64), width, 16, length, xp, most=784)

    found = [tuple(int(x) for x in graph(*map(tf.constant, case))) for case in cases]
    assert found == [tuple(map(int, patches.grid(h, w, 16, n))) for h, w, n in cases]
    assert (49, 16) in found


def test_a_length_is_drawn_by_seed_and_step():
    c, other = config(), config(seed=1, lanes=2)
    drawn = [order.sequence_length(c, step) for step in range(3000)]
    assert all(900 < drawn.count(length) < 1100 for length in LENGTHS)
    assert drawn[:6] == [6, 6, 12, 20, 6, 6]  # in a later version, too
    assert drawn[:40] != [order.sequence_length(other, step) for step in range(40)]
    fewer_lanes = dataclasses.replace(c, input=dataclasses.replace(c.input, lanes=2))
    assert drawn[:40] == [order.sequence_length(fewer_lanes, step) for step in range(40)]
    assert order.sequence_length(config(lengths=(9,)), 5) == 9


def test_a_batch_has_the_length_of_its_step(folder):
    c = config(folder / "out", name="whole", crop_min_area=0.5, flip_rate=0.5, reader_threads=1)
    whole = record_sets.take(c, 4)
    for step, batch in enumerate(whole):
        length = order.sequence_length(c, step)
        assert batch.image.pixels.shape == (8, length, 3 * 8**2)
        assert batch.image.pixels.dtype == np.uint8 and batch.image.grid.dtype == np.int32
        count = batch.image.grid.prod(axis=1)
        assert (count <= length).all()
        behind = np.arange(length) >= count[:, None]
        assert not batch.image.pixels[behind].any()
    assert len({batch.image.pixels.shape for batch in whole}) > 1
    # Later steps and some lanes alone, as another process reads them.
    (got,) = record_sets.take(c, 1, start_step=3, lanes=(2, 3))
    half = jax.tree.map(lambda x: x[len(x) // 2 :], whole[3])
    jax.tree.map(np.testing.assert_array_equal, got, half)


def test_shapes_change_nothing_but_the_image(folder):
    squares = record_sets.take(record_sets.config(folder / "out", name="whole"), 1)
    for square, own in zip(squares, record_sets.take(config(folder / "out", name="whole"), 1)):
        assert square.image.shape == (8, 16, 16, 3)
        plain = [x._replace(image=None) for x in (square, own)]
        jax.tree.map(np.testing.assert_array_equal, *plain)


def test_mirrored_images_are_mirrored_before_they_are_cut(folder):
    given = dict(output=folder / "out", name="whole", lengths=(12,))
    (plain,) = record_sets.take(config(**given), 1)
    (mirrored,) = record_sets.take(config(**given, flip_rate=1.0), 1)
    for i, (rows, columns) in enumerate(plain.image.grid):
        images = (x.image.pixels[i, : rows * columns] for x in (plain, mirrored))
        one, other = (x.reshape(rows, columns, 8, 8, 3) for x in images)
        np.testing.assert_array_equal(one[:, ::-1, :, ::-1], other)
    real = plain.region_mask
    x, other = plain.region_boxes_cxcywh[real][:, 0], mirrored.region_boxes_cxcywh[real][:, 0]
    np.testing.assert_allclose(other, 1 - x, atol=1e-6)


def test_stored_inside_keeps_the_ratio_and_squares_know_their_shape(folder, caplog):
    grids = {}
    for name in ("whole", "inside", "square"):
        (batch,) = record_sets.take(config(folder / "out", name=name, lengths=(12,)), 1)
        grids[name] = dict(zip(identity(batch), batch.image.grid.tolist()))
    assert len({tuple(grid) for grid in grids["whole"].values()}) > 2
    assert grids["square"] == grids["whole"]
    same = [grids["inside"][key] == grid for key, grid in grids["whole"].items()]
    assert np.mean(same) >= 0.75  # 33 x 17 becomes 24 x 12, another ratio
    notes = {
        name: json.loads((folder / "out" / name / "1.0.0/metadata.json").read_text())
        for name in grids
    }
    assert "fit" not in notes["whole"]
    assert (notes["inside"]["fit"], notes["square"]["fit"]) == ("inside", "square")
    sources.open_source(config(folder / "out", name="square"))
    assert "squashed" not in caplog.text


def test_a_set_that_lost_its_shapes_says_so(folder, tmp_path, caplog):
    status = record_sets.build_set(folder, tmp_path, "--num-shards=4", name="old")
    assert status == 0
    notes = tmp_path / "old/1.0.0/metadata.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"store_size": 24}))
    sources.open_source(record_sets.config(tmp_path, name="old"))
    assert "squashed" not in caplog.text
    sources.open_source(config(tmp_path, name="old"))
    assert "'old' has images that were squashed to 24 x 24" in caplog.text
    caplog.clear()  # where the lengths are derived, a set that is left out says so
    (none,) = records.image_sizes(config(tmp_path, lengths=None, name="old"))
    assert none.shape == (0, 2) and "'old' has images that were squashed" in caplog.text


def test_damage_is_found_at_its_length(folder, tmp_path):
    shards = sorted((folder / "out/whole/1.0.0").glob("*tfrecord*"))
    shutil.copytree(folder / "out/whole", tmp_path / "whole")
    (tmp_path / "whole/1.0.0/digest.json").unlink()
    for shard in shards:
        records = [r.numpy() for r in tf.data.TFRecordDataset(str(shard))]
        records[0] = record_sets.with_cut_picture(records[0])
        record_sets.write_shard(tmp_path / "whole/1.0.0" / shard.name, records)
    with pytest.raises(errors.UserError, match=r"tfrecord-0000\d-of-00008, record 0: "):
        record_sets.take(config(tmp_path, name="whole"), 8)


def test_data_sources_give_images_of_any_size():
    c = config(max_regions=1)
    clip = tokenizer.of_tower(c.model.text)
    images = [golden.photograph(h, w) for w, h in SIZES]
    examples = [assemble.Example(image, "a bird") for image in images]
    step = next(s for s in range(99) if order.sequence_length(c, s) == 20)
    found = assemble.of_examples(examples, c, clip, step).image
    for i, image in enumerate(images):
        alone = patches.of_image(image, 8, 20)
        np.testing.assert_array_equal(found.pixels[i], alone.pixels)
        np.testing.assert_array_equal(found.grid[i], alone.grid)
    with pytest.raises(ValueError, match="step: got None with input.sequence_lengths"):
        assemble.of_examples(examples, c, clip)
    one = config(max_regions=1, lengths=(6,))
    assert assemble.of_examples(examples, one, clip).image.pixels.shape == (4, 6, 192)
    with pytest.raises(ValueError, match=r"uint8 \[4, 4\], expected uint8 \[H, W, 3\]"):
        wrong = assemble.Example(np.zeros((4, 4), np.uint8), "a bird")
        assemble.of_examples([wrong, wrong], one, clip)


def test_random_batches_have_shapes_and_reach_the_devices():
    c = config(source="synthetic")
    batches = list(itertools.islice(synthetic.batches(c), 4))
    for step, batch in enumerate(batches):
        assert batch.image.pixels.shape == (8, order.sequence_length(c, step), 192)
        assert len({tuple(grid) for grid in batch.image.grid.tolist()}) > 1
        real = np.arange(batch.image.pixels.shape[1]) < batch.image.grid.prod(axis=1)[:, None]
        assert not batch.image.pixels[~real].any() and batch.image.pixels[real].any(axis=-1).all()
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    for got, expected in zip(device.Prefetch(iter(batches), sharding), batches, strict=True):
        assert isinstance(got.image, Patches)
        assert got.image.pixels.addressable_shards[0].data.shape[0] == 2
        jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("lengths", [(4, 0), (4, 4), (2**20,)])
def test_lengths_that_cannot_be(lengths):
    with pytest.raises(errors.UserError) as error:
        config(lengths=lengths)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"input.sequence_lengths: got {lengths}, expected different numbers of")


def test_a_tower_of_squares_refuses_lengths():
    given = dict(model__image__tower="examples.tower.mixer:Mixer", input__sequence_lengths=(4,))
    with named.importing(), pytest.raises(errors.UserError) as error:
        tiny.config(**given)
    expected = "input.sequence_lengths: got (4,) with the tower examples.tower.mixer:Mixer, which"
    assert any(line.startswith(expected) for line in str(error.value).splitlines())
