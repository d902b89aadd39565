"""examples/source: a user's CSV reader, through the real command to records that training reads."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from grain_jax.data import build
from grain_jax.data.annotate import __main__ as command
from tests import record_sets

# TFDS 4.9.10 asks protobuf for a field's label; protobuf 6 has another name for it.
pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")

HEADER = "image;caption;x1;y1;x2;y2;phrase\n"
ROWS = """\
street/0.png;a bus;0.25;0.5;0.75;1;a red bus
street/0.png;a bus at a stop;0;0;0.5;0.5;a sign
street/1.png;an empty road;;;;;
"""
SIZE = (40, 20)


def arguments(folder, *more):
    return [
        "--source=examples.source.csv_boxes:CsvBoxes",
        f"--annotations={folder / 'boxes.csv'}",
        f"--images={folder}",
        f"--output={folder / 'out'}",
        "--passes=none",
        *more,
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "street").mkdir()
    for number in range(2):
        record_sets.picture(number, SIZE).save(tmp_path / f"street/{number}.png")
    (tmp_path / "boxes.csv").write_text(HEADER + ROWS)
    return tmp_path


def test_the_command_converts_the_file_and_builds_records(folder, capsys):
    argv = arguments(folder, "--option=delimiter=;", "--option=unit=share")
    assert command.main(argv) == 0
    argv = [f"--annotations={folder / 'out/A.jsonl'}", f"--output={folder / 'out/records'}"]
    assert build.main([*argv, f"--images={folder}", "--name=street"]) == 0
    assert "2 of 2 images, 2 regions" in capsys.readouterr().out
    builder = tfds.builder("street", data_dir=folder / "out/records")
    examples = {x["id"].decode(): x for x in tfds.as_numpy(builder.as_dataset(split="train"))}
    assert sorted(examples) == ["street/0.png", "street/1.png"]
    first, second = examples["street/0.png"], examples["street/1.png"]
    assert first["captions"].tolist() == [b"a bus", b"a bus at a stop"]
    assert first["regions"]["description"].tolist() == [b"a red bus", b"a sign"]
    yxyx = [[0.5, 0.25, 1, 0.75], [0, 0, 0.5, 0.5]]
    np.testing.assert_allclose(first["regions"]["bbox"], yxyx, atol=1e-6)
    assert first["regions"]["score"].tolist() == [1, 1]
    np.testing.assert_array_equal(first["image"], np.asarray(record_sets.picture(0, SIZE)))
    assert second["captions"].tolist() == [b"an empty road"]
    assert len(second["regions"]["score"]) == 0
