"""An image is what a viewer shows: turned ones give what upright copies give, wherever they are read."""

import contextlib
import io
import json
import struct

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tensorflow_datasets as tfds

import grain_jax
from grain_jax.core import images
from grain_jax.data.annotate import __main__ as annotate
from grain_jax.data.inspect import __main__ as inspect
from tests import record_sets, turned

pytestmark = [pytest.mark.filterwarnings("ignore:label:DeprecationWarning"), pytest.mark.long]
WHICH = ("turned", "upright")
COUNT, TURNED = 40, 35


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """turned/ and upright/ with images and A.jsonl, and a record set of each below sets/."""
    root = tmp_path_factory.mktemp("orientation")
    turned.write(root)
    for which in WHICH:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            flags = ("--num-shards=8",)
            assert record_sets.build_set(root / which, root / "sets", *flags, name=which) == 0
        (root / f"{which}.txt").write_text(said.getvalue())
    return root


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


FILES = turned.files()


@pytest.mark.parametrize("name", FILES)
def test_a_file_becomes_what_a_viewer_shows(name):
    encoded, shown = FILES[name]
    image = images.decode_image(encoded)
    np.testing.assert_array_equal(image, shown)
    np.testing.assert_array_equal(PIL.ImageOps.exif_transpose(image), shown)  # turned once
    opened = PIL.Image.open(io.BytesIO(encoded))
    np.testing.assert_array_equal(images.upright(opened), shown)
    tag = int(name[:2]) % 8 + 1
    header = images.header(encoded)
    assert (header.size, header.turned) == (turned.SIZE, tag > 1)


def entry(tag=274, kind=3, values=1, value=6):
    return struct.pack(">HHLHH", tag, kind, values, value, 0)


HEAD = b"MM\0*\0\0\0\x08\0\1"
DAMAGED = [
    *(b"", b"MM", b"MM\0*\0\0\0\x08", b"no Exif at all"),
    b"MM\0*\xff\xff\xff\xff\0\1" + entry(),
    b"II*\0\x08\0\0\0\xff\xff" + b"\0" * 40,
    *(HEAD + entry()[:-4], HEAD + entry(value=9), HEAD + entry(value=0)),
    *(HEAD + entry(kind=2), HEAD + entry(values=3)),
]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG behind", "WEBP"])
def test_a_damaged_exif_means_upright(kind):
    pixels = np.arange(8 * 4 * 3, dtype=np.uint8).reshape(8, 4, 3)
    for block in DAMAGED:
        encoded = turned.encode(pixels, kind, 1, block)
        header = images.header(encoded)
        sizes = header.size, images.decode_image(encoded).size
        assert (header.turned, *sizes) == (False, (4, 8), (4, 8)), block


def test_records_hold_upright_pixels(folder):
    lines = {line["image"]: line for line in lines_of(folder / "upright" / "A.jsonl")}
    said = (folder / "turned.txt").read_text()
    assert f"A.jsonl: {TURNED} of {COUNT} images are turned upright by their EXIF" in said
    assert f"A.jsonl: 0 of {COUNT} lines faulty (0 faults)\n" in said
    assert "EXIF" not in (folder / "upright.txt").read_text()
    builder = tfds.builder("turned", data_dir=folder / "sets")
    skip = {"image": tfds.decode.SkipDecoding()}
    for example in tfds.as_numpy(builder.as_dataset(split="train", decoders=skip)):
        name = example["id"].decode()
        assert not images.header(example["image"]).turned
        expected = images.load_image(folder / "upright" / name)
        np.testing.assert_array_equal(images.decode_image(example["image"]), expected)
        (box,) = example["regions"]["bbox"]
        x1, y1, x2, y2 = lines[name]["regions"][0]["box"]
        np.testing.assert_allclose(box * [40, 24, 40, 24], [y1, x1, y2, x2], atol=1e-5)


def test_annotate_takes_boxes_of_the_upright_pixels(folder, tmp_path):
    flags = ["--passes=none", f"--images={folder / 'turned'}", "--min-side=1"]
    flags += ["--source=annotations", f"--annotations={folder / 'turned' / 'A.jsonl'}"]
    made = [f"--output={tmp_path / 'made'}"]
    assert annotate.main([*flags, *made]) == 0
    assert [line["regions"] for line in lines_of(tmp_path / "made" / "A.jsonl")] == [
        line["regions"] for line in lines_of(folder / "upright" / "A.jsonl")
    ]


def test_inspect_counts_them(folder, tmp_path, capsys):
    path = str(folder / "turned" / "A.jsonl")
    assert inspect.main([path, f"--output={tmp_path}"]) == 0
    assert f"turned        {TURNED} images are turned upright by" in capsys.readouterr().out
    counted = json.loads((tmp_path / "statistics.json").read_text())["images"]
    assert (counted["turned"], counted["sizes"]) == (TURNED, [["24 x 40", COUNT]])
    assert inspect.main([str(folder / "sets/turned"), f"--output={tmp_path}"]) == 0
    assert "EXIF" not in capsys.readouterr().out


def test_the_library(folder):
    model = grain_jax.load("aviary-tiny")
    names = [line["image"] for line in lines_of(folder / "turned" / "A.jsonl")]
    got, expected = (
        model.encode_image_and_regions(PIL.Image.open(folder / which / name) for name in names)
        for which in WHICH
    )
    for a, b in zip((got[0], *got[1]), (expected[0], *expected[1])):
        np.testing.assert_allclose(a, b, atol=1e-6)
