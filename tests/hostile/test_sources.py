"""What hostile annotation files and tables do to the readers of public formats: a named fault or one line, in time."""

import os

import pyarrow as pa
import pyarrow.parquet
import pytest

from grain_jax.core import errors
from grain_jax.data import build, sources
from tests.data import test_sources
from tests.data.test_sources import boxes, descriptions, encoded
from tests.hostile import cases

pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")


read = test_sources.read_all


def test_entities_of_a_stranger(tmp_path):
    options = test_sources.flickr30k_entities_sample(tmp_path)
    sentences, boxes = tmp_path / "Sentences", tmp_path / "Annotations"
    for path in (sentences / "1.txt", boxes / "2.xml"):
        path.unlink()
        os.mkfifo(path)
    many = "".join(f"[/EN#1/x a{n}] " for n in range(3000))
    objects = "<object><name>1</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    (sentences / "3.txt").write_text(many)
    (boxes / "3.xml").write_text(f"<annotation>{objects * 500}</annotation>")
    (sentences / "4.txt").write_text("[/EN#1/" * 9000)
    lol = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    (boxes / "5.xml").write_text(f'<!DOCTYPE x [<!ENTITY l0 "lol">{lol}]><x>&l9;</x>')
    (boxes / "6.xml").write_text('<?xml version="1.0" encoding="nonsense"?><a/>')
    (boxes / "7.xml").write_text("<a>" * 15_000)
    faults = {
        x.image: x.detail
        for x in read("flickr30k_entities", options)
        if isinstance(x, sources.Fault)
    }
    assert sorted(faults) == [f"{n}.jpg" for n in range(1, 8) if n != 4]
    assert "expected sentences" in faults["1.jpg"] and "expected boxes" in faults["2.jpg"]
    assert "at most 10,000 boxes" in faults["3.jpg"]


@pytest.mark.parametrize(
    "content,line",
    [
        (b"\x80\x02]r\x00\x00\x00\x7f.", "expected refs"),  # the place of 2 billion objects
        (b"(" * 200_000 + b"l" * 200_000 + b".", "Expected `object`, got `array`|nested too deep"),
        (b"cos\nsystem\n(S'true'\ntR.", "no pickle of plain values .it wants os.system"),
    ],
)
def test_pickles_of_a_stranger(tmp_path, content, line):
    options = test_sources.refcoco_sample(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(content)
    with pytest.raises(sources.SourceError, match=line) as error:
        read("refcoco", options)
    assert len(str(error.value).splitlines()) == 1


GOOD = {
    "image": [{"bytes": encoded(n), "path": f"{n}.jpg"} for n in range(4)],
    "caption": ["a"] * 4,
    "boxes": [boxes(n) for n in range(4)],
    "descriptions": [descriptions(n) for n in range(4)],
}


def write(folder, source, table):
    """The table as a file of the source; returns it."""
    if source == "parquet":
        pyarrow.parquet.write_table(table, folder / "t.parquet", row_group_size=2)
        return folder / "t.parquet"
    test_sources.save_to_disk(table, folder / "saved")
    return folder / "saved"


def run(folder, source, path):
    words = ["--source", source, "--annotations", path, "--images", folder, "--output", folder]
    return cases.run(build.main, [*words, "--name=x"])


def test_a_saved_folder_names_no_file_elsewhere(tmp_path):
    given = write(tmp_path, "hf-dataset", pa.table(GOOD))
    (given / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    line = "got the name '../x', expected a path below"
    cases.check(run(tmp_path, "hf-dataset", given), line)
    (given / "dataset_dict.json").write_text('{"splits": ["../.."]}')
    options = sources.Options("x", (str(given),), split="../..")
    with pytest.raises(errors.UserError, match="expected a path below"):
        sources.shards("hf-dataset", options)
