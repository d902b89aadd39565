"""What hostile annotation files and tables do to the readers of public formats: a named fault or one line, in time."""

import os

import pyarrow as pa
import pyarrow.parquet
import pytest

from grain_jax.core import errors
from grain_jax.data import build, sources
from grain_jax.data.sources import columns, json_files
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


def test_a_long_list_is_read_an_item_at_a_time(tmp_path, monkeypatch):
    """Of numbers, of long items and of items that chunks cut: what is no item is a fault, what is no list ends it."""
    monkeypatch.setattr(json_files, "_CHUNK", 7)
    monkeypatch.setattr(json_files, "_MAX_ITEM", 200)
    path = tmp_path / "list.json"

    def read(text):
        path.write_text(text)
        return list(json_files.read_list(path, dict[str, int], "objects"))

    found = read('[{"a": 1},\n 7, {"b": [1]}, {"c": "x"}, {"ddddddddd": 4}]')
    assert [item for item in found if isinstance(item, dict)] == [{"a": 1}, {"ddddddddd": 4}]
    assert [item.image for item in found if not isinstance(item, dict)] == [
        f"{path}[{number}]" for number in (1, 2, 3)
    ]
    for text, line in (
        ("{}", "got '{}', expected a list: objects"),
        ('[{"a": 1}, {"a"', r"\[1\]: not a JSON list"),
        (f'["{"x" * 900}"]', r"\[0\]: not a JSON list"),
        ("[" * 100, r"\[0\]: not a JSON list"),
    ):
        with pytest.raises(errors.UserError, match=line):
            read(text)


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


# name -> (what the first row of a column becomes, the line)
OF_ROWS = {
    "a path out of the folder": ("image", {"bytes": None, "path": "../x.jpg"}, "expected a path below the images' folder"),
    "a list too long": ("boxes", [(1, 1, 9, 9)] * (columns.MAX_REGIONS + 1), "bad annotation: .*length <= 10000.*boxes"),
    "a text too long": ("caption", "x" * (1 << 21), "bad annotation: .*length <= 1048576.*caption"),
}  # fmt: skip


@pytest.mark.parametrize("what", OF_ROWS)
def test_a_row_that_cannot_be_used(tmp_path, what):
    name, value, line = OF_ROWS[what]
    kinds = {"boxes": pa.list_(pa.list_(pa.float64()))}
    values = GOOD | {name: [value, *GOOD[name][1:]]}
    table = pa.table({key: pa.array(x, kinds.get(key)) for key, x in values.items()})
    outcome = run(tmp_path, "parquet", write(tmp_path, "parquet", table))
    cases.check(outcome, f"t.parquet:row 0: .*{line}")
    assert "1 of 4 lines are faulty, more than --max-faults" in outcome.err


def test_a_saved_folder_names_no_file_elsewhere(tmp_path):
    given = write(tmp_path, "hf-dataset", pa.table(GOOD))
    (given / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    line = "got the name '../x', expected a path below"
    cases.check(run(tmp_path, "hf-dataset", given), line)
    (given / "dataset_dict.json").write_text('{"splits": ["../.."]}')
    options = sources.Options("x", (str(given),), split="../..")
    with pytest.raises(errors.UserError, match="expected a path below"):
        sources.shards("hf-dataset", options)


def test_a_list_of_nothing_a_billion_times(tmp_path):
    """A list of nulls takes no byte in Arrow, and a pointer each in Python."""
    nothing = pa.ListArray.from_arrays(pa.array([0, 10**9], pa.int32()), pa.nulls(10**9))
    image = pa.StructArray.from_arrays([pa.array([b"x"]), nothing], ["bytes", "other"])
    table = pa.table({"image": image, "caption": ["a"]})
    outcome = run(tmp_path, "hf-dataset", write(tmp_path, "hf-dataset", table))
    cases.check(outcome, "row 0: got 64,000,000,0.. bytes, expected at most")


OF_CSV = {
    "a quote without an end": (b'image,caption\na.jpg,"b\n' + b"x\n" * 90_000, "t.csv:.*(field larger|unexpected end)"),
    "out of the folder": (b"image,caption\n../a.jpg,b\n", "../a.jpg: bad annotation: expected a path below"),
    "a line too long": (b"image,caption\n" + b"x" * (columns.MAX_LINE + 1), "got a line of over"),
}  # fmt: skip


@pytest.mark.parametrize("what", OF_CSV)
def test_csv(tmp_path, what):
    content, line = OF_CSV[what]
    (tmp_path / "t.csv").write_bytes(content)
    cases.check(run(tmp_path, "csv", tmp_path / "t.csv"), line)
