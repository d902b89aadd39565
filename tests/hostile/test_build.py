import io

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from grain_jax.core import images
from grain_jax.data import example
from grain_jax.input_pipeline import records, transforms
from tests import record_sets
from tests.hostile import cases, image_files

pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")


def wrong_checksum(encoded):
    """A PNG that PIL reads over: the checksum behind its pixels is wrong."""
    at = encoded.rindex(b"IEND") - 5
    return encoded[:at] + bytes([encoded[at] ^ 1]) + encoded[at + 1 :]


def cut_end(encoded):
    return encoded[:-12]  # IEND is gone


def test_training_reads_what_was_built(tmp_path):
    record_sets.write_annotations(tmp_path / "in", 16)
    original = image_files.encode("PNG", (16, 12))
    for number, change in enumerate((bytes, wrong_checksum, cut_end)):
        (tmp_path / f"in/{number:05d}.png").write_bytes(change(original))
    outcome = cases.run(
        lambda _: record_sets.build_set(tmp_path / "in", tmp_path / "out", "--num-shards=4"), []
    )
    assert outcome.status == 0
    rescued = (
        "2 of 16 images stored as PNG, since training cannot read their files; the first is id1"
    )
    assert rescued in outcome.err
    config = record_sets.config(tmp_path / "out")
    batches = records.batches(config)
    for _ in range(4):
        assert next(batches).image.shape == (8, 16, 16, 3)
    builder = tfds.builder_from_directory(tmp_path / "out" / "tiny_set" / "1.0.0")
    stored = {x["id"]: x["image"] for x in tfds.as_numpy(builder.as_dataset(split="train"))}
    expected = PIL.Image.open(io.BytesIO(original)).convert("RGB")
    for name in (b"id0", b"id1", b"id2"):
        np.testing.assert_array_equal(stored[name], np.asarray(expected))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_no_mutated_image_is_accepted_that_training_refuses(kind):
    original, accepted, rescued = example.Encoding("original"), 0, 0
    seeds = [image_files.encode(kind), image_files.encode(kind, (61, 47))]
    for number in range(200):
        encoded = image_files.mutate(seeds[number % 2], number)
        try:
            picture = images.decode_image(encoded)
        except images.ImageError:
            continue
        stored, anew = example.encode_image(picture, encoded, original)
        decoded = transforms.decode(tf.constant(stored)).numpy()  # raises where training would
        assert decoded.shape == (picture.height, picture.width, 3)
        accepted, rescued = accepted + 1, rescued + anew
        assert (stored == encoded) != anew
    assert accepted > 20
    assert rescued > 10 or kind == "JPEG"
