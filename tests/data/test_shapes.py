"""What grain-jax build stores of images' shapes, and what grain-jax inspect says of them."""

import json

import numpy as np
import PIL.Image
import pytest

from grain_jax.core import errors, images, patches
from grain_jax.data import example
from grain_jax.data.arguments import Build, Encoding
from grain_jax.data.inspect import __main__ as command
from grain_jax.data.inspect import counting, statistics
from grain_jax.input_pipeline import image_shapes, records
from tests import record_sets

# TFDS 4.9.10 asks protobuf for a field's label; protobuf 6 has another name for it.
pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")
GIVEN = ["--annotations=a", "--images=b", "--output=c", "--name=d"]


@pytest.mark.parametrize(
    ("size", "stored"),
    [
        ((80, 20), (40, 10)),
        ((30, 90), (13, 40)),
        ((40, 7), (40, 7)),
        ((9, 8), (9, 8)),
        ((900, 2), (40, 1)),
    ],
)
def test_fit_inside_keeps_the_ratio_and_enlarges_nothing(size, stored):
    picture = record_sets.picture(3, size)
    encoded = images.encode_png(picture)
    image = images.decode_image(encoded)
    found, anew = example.encode_image(image, encoded, Encoding(size=40, fit="inside"))
    got = images.decode_image(found)
    assert got.size == stored and not anew
    if size == stored:
        assert found == encoded  # the file's own bytes
    else:
        expected = picture.resize(stored, PIL.Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(got, expected)


def test_fit_needs_a_size():
    with pytest.raises(errors.UserError, match="--fit: got inside without --store-size"):
        Build.parse([*GIVEN, "--fit=inside"])
    given = Build.parse([*GIVEN, "--fit=inside", "--store-size=512"])
    assert given.stored == Encoding(size=512, fit="inside") and not given.stored.squashes
    assert Build.parse([*GIVEN, "--store-size=9"]).stored.squashes


def test_shapes_are_counted():
    shapes = counting.Shapes()
    shapes.add([(200, 100)] * 3 + [(100, 100)] * 6)
    shapes.add([(100, 400)])
    shapes.add([])
    found = shapes.result()
    assert found["count"] == 10 and found["long"] == 0.4
    assert found["ratios"] == {"5%": 0.25, "25%": 1.0, "50%": 1.0, "75%": 2.0, "95%": 2.0}
    grids = {(200, 100): 3, (100, 100): 6, (100, 400): 1}
    for length in patches.LENGTHS:
        real = sum(n * int(np.prod(patches.grid(h, w, 16, length))) for (w, h), n in grids.items())
        assert found["padding"][str(length)] == pytest.approx(1 - real / (10 * length))
    assert counting.Shapes().result() == {"count": 0}
    assert statistics.shape_lines({"count": 0}) == []


def test_inspect_recommends_by_the_shapes(tmp_path, capsys):
    lines = record_sets.write_annotations(tmp_path, 8, size=(16, 15))
    build = lambda name, *more: record_sets.build_set(tmp_path, tmp_path / "out", *more, name=name)
    assert command.main([str(tmp_path / "A.jsonl"), f"--output={tmp_path / 'seen'}"]) == 0
    assert "0% of the images are longer than 1.25 : 1: squares suit" in capsys.readouterr().out
    for line in lines[:4]:
        PIL.Image.new("RGB", (60, 15)).save(tmp_path / line["image"])
    assert build("mine", "--store-size=12") == 0
    config = record_sets.config(tmp_path / "out", name="mine")
    (sizes,) = records.image_sizes(config)
    assert sorted(map(tuple, sizes.tolist())) == [(15, 16)] * 4 + [(15, 60)] * 4
    assert image_shapes.share_of_long(sizes) == 0.5
    capsys.readouterr()
    assert command.main([str(tmp_path / "out/mine"), f"--output={tmp_path / 'seen'}"]) == 0
    printed = capsys.readouterr().out
    assert (
        "shapes        width / height 1.07 (5%), 1.07 (25%), 1.07 (50%), 4 (75%), 4 (95%)"
        in printed
    )
    assert "50% of the images are longer than 1.25 : 1: keep their shape" in printed
    assert "50% of the images" in (tmp_path / "seen/inspect.html").read_text()
    # A set of before the note of the original size.
    assert build("old") == 0
    notes = tmp_path / "out/old/1.0.0/metadata.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"store_size": 12}))
    assert command.main([str(tmp_path / "out/old"), f"--output={tmp_path / 'seen'}"]) == 0
    assert "stored as squares of 12, their own shape is lost" in capsys.readouterr().out
    assert [
        len(x) for x in records.image_sizes(record_sets.config(tmp_path / "out", name="old"))
    ] == [0]
