"""Hostile tables: Parquet, folders of `datasets`, CSV. What is wrong is one line, of the file or of a row."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from grain_jax.core import errors
from grain_jax.data import build, sources
from grain_jax.data.sources import arrow_tables, columns
from tests.data import test_sources
from tests.data.test_sources import boxes, descriptions, encoded
from tests.hostile import cases

pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")
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


def run(folder, source, path, *options):
    words = ["--source", source, "--annotations", path, "--images", folder, "--output", folder]
    words += ["--name=x", *(["--option", *options] if options else [])]
    return cases.run(build.main, words)


# name -> (what a column becomes, None: it is gone; options; the line)
OF_COLUMNS = {
    "no image": ({"image": None}, (), "has no column image; --option image=COLUMN, expected one of: caption"),
    "no such column": ({}, ("caption=text",), r"has no column text \(--option caption\), expected one of: image"),
    "no such field": ({}, ("image=image.url",), r"column image.url \(--option image\) is without the field url: struct<"),
    "numbers as captions": ({"caption": [1, 2, 3, 4]}, (), r"column caption \(--option caption\) is int64, expected texts"),
    "boxes without texts": ({"descriptions": None}, (), "has boxes without a text; --option labels=COLUMN or"),
    "numbers without names": (
        {"descriptions": None, "labels": [[0, 1]] * 4},
        (),
        "column labels has numbers, and the file no names for them; --option names=FILE",
    ),
    "another format": ({}, ("box_format=yxyx",), "box_format: got 'yxyx', expected one of xyxy, xywh, cxcywh"),
    "three sides": ({}, ("boxes=x,y,z",), "boxes: got 'x,y,z', expected one column, or four"),
    "labels without boxes": (
        {"boxes": None},
        ("descriptions=descriptions",),
        "--option descriptions without boxes; --option boxes=COLUMN, expected one of: image",
    ),
    "control characters": ({"a\x1b[2J": [1] * 4}, ("caption=x",), r"expected one of: image, caption, boxes, descriptions, a"),
}  # fmt: skip


@pytest.mark.parametrize("source", ["parquet", "hf-dataset"])
@pytest.mark.parametrize("what", OF_COLUMNS)
def test_columns_that_are_not_there_or_of_another_type(tmp_path, source, what):
    change, options, line = OF_COLUMNS[what]
    table = {name: x for name, x in (GOOD | change).items() if x is not None}
    outcome = run(tmp_path, source, write(tmp_path, source, pa.table(table)), *options)
    cases.check(outcome, line)
    assert len(outcome.err.splitlines()) == 1


# name -> (what the first row of a column becomes, the line)
OF_ROWS = {
    "no image in the bytes": ("image", {"bytes": b"nothing", "path": "a.jpg"}, "a.jpg: unreadable: .*no known image format"),
    "neither": ("image", {"bytes": None, "path": None}, "no picture: got neither bytes nor a path"),
    "a path out of the folder": ("image", {"bytes": None, "path": "../x.jpg"}, "expected a path below the images' folder"),
    "a list too long": ("boxes", [(1, 1, 9, 9)] * (columns.MAX_REGIONS + 1), "bad annotation: .*length <= 10000.*boxes"),
    "fewer boxes than texts": ("boxes", [(1, 1, 9, 9)], "got 1 boxes, 2 texts and 1 scores, expected as many of each"),
    "a text too long": ("caption", "x" * (1 << 21), "bad annotation: .*length <= 1048576.*caption"),
    "three numbers": ("boxes", [(1, 2, 3), (1, 1, 9, 9)], "bad box: got box .*1.0, 2.0, 3.0.*expected four finite"),
    "outside": ("boxes", [(100, 100, 200, 200), (1, 1, 9, 9)], "expected at least 50% of it in the image"),
}  # fmt: skip


@pytest.mark.parametrize("what", OF_ROWS)
def test_a_row_that_cannot_be_used(tmp_path, what):
    name, value, line = OF_ROWS[what]
    kinds = {"boxes": pa.list_(pa.list_(pa.float64()))}
    values = GOOD | {name: [value, *GOOD[name][1:]]}
    table = pa.table({key: pa.array(x, kinds.get(key)) for key, x in values.items()})
    outcome = run(tmp_path, "parquet", write(tmp_path, "parquet", table))
    of_region = what in ("three numbers", "outside")
    cases.check(outcome, f"t.parquet:row 0: .*{line}", status=0 if of_region else 2)
    told = "1 regions left out" if of_region else "1 of 4 lines are faulty, more than --max-faults"
    assert told in outcome.err


def test_bytes_alone_need_no_folder_and_paths_do(tmp_path):
    table = pa.table({"image": ["a.jpg"], "caption": ["a"]})
    path = write(tmp_path, "parquet", table)
    words = ["--source=parquet", f"--annotations={path}", f"--output={tmp_path}", "--name=x"]
    cases.check(cases.run(build.main, words), "no such file: got the path 'a.jpg' and no --images")
    table = pa.table({"image": [encoded(0)], "caption": ["a"]})
    write(tmp_path, "parquet", table)
    assert cases.run(build.main, words).status == 0


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


DAMAGE = {
    "cut off": cut,
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "without an end": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_one_line(tmp_path, how):
    table = pa.table(GOOD)
    for source, name in (("parquet", "t.parquet"), ("hf-dataset", "data-00000-of-00001.arrow")):
        given = write(tmp_path, source, table)
        (path,) = tmp_path.rglob(name)
        DAMAGE[how](path)
        outcome = run(tmp_path, source, given)
        cases.check(
            outcome,
            f"({path}: (damaged|no such file|got a folder|No such file))|expected a path below",
        )
        assert len(outcome.err.splitlines()) == 1, outcome.err


@pytest.mark.parametrize("source", ["parquet", "hf-dataset"])
def test_flipped_bytes_are_found_or_harmless(tmp_path, source):
    """Whatever is flipped, the process lives, and what it says is a line; images that come out are decoded later."""
    table = pa.table(GOOD)
    given = write(tmp_path, source, table)
    path = given if source == "parquet" else given / "data-00000-of-00001.arrow"
    good, rng = path.read_bytes(), np.random.default_rng(0)
    options = sources.Options(str(tmp_path), (str(given),))
    said = 0
    for _ in range(300):
        changed = bytearray(good)
        for at in rng.integers(0, len(good), 3):
            changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            for shard in sources.shards(source, options):
                said += any(isinstance(x, sources.Fault) for x in sources.read(shard))
        except errors.UserError as error:
            said += 1
            assert len(str(error).splitlines()) == 1 and str(error).isprintable()
    assert said > 20


NOTES = [
    ("state.json", json.dumps({"_data_files": [{"filename": "../x"}]}).encode(), "got the name '../x', expected a path below"),
    ("state.json", b"{" * 9, "state.json: JSON is malformed"),
    ("dataset_dict.json", b'{"splits": ["../.."]}', "got --split train, expected one of: ../.."),
]  # fmt: skip


@pytest.mark.parametrize("name,content,line", NOTES)
def test_the_notes_of_a_saved_folder(tmp_path, name, content, line):
    given = write(tmp_path, "hf-dataset", pa.table(GOOD))
    (given / name).write_bytes(content)
    cases.check(run(tmp_path, "hf-dataset", given), line)


def test_a_split_stays_in_its_folder_and_names_may_be_anything(tmp_path):
    given = write(tmp_path, "hf-dataset", pa.table(GOOD))
    (given / "dataset_dict.json").write_text('{"splits": ["../.."]}')
    options = sources.Options("x", (str(given),), split="../..")
    with pytest.raises(errors.UserError, match="expected a path below"):
        sources.shards("hf-dataset", options)


def test_a_row_of_many_bytes_is_no_list_of_python(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_tables, "_MANY_BYTES", 1000)
    monkeypatch.setattr(arrow_tables, "_MAX_ROW", 50_000)
    table = pa.table({"image": [b"x" * 100, b"x" * 60_000]})
    outcome = run(tmp_path, "parquet", write(tmp_path, "parquet", table))
    cases.check(outcome, "row 1: got 60,0.. bytes, expected at most 50,000 of a row")


def test_a_list_of_nothing_a_billion_times(tmp_path):
    """A list of nulls takes no byte in Arrow, and a pointer each in Python."""
    nothing = pa.ListArray.from_arrays(pa.array([0, 10**9], pa.int32()), pa.nulls(10**9))
    image = pa.StructArray.from_arrays([pa.array([b"x"]), nothing], ["bytes", "other"])
    table = pa.table({"image": image, "caption": ["a"]})
    outcome = run(tmp_path, "hf-dataset", write(tmp_path, "hf-dataset", table))
    cases.check(outcome, "row 0: got 64,000,000,0.. bytes, expected at most")


OF_CSV = {
    "no column": (b"file,text\na.jpg,b\n", "has no column image; --option image=COLUMN, expected one of: file, text"),
    "a cell too many": (b"image,caption\na.jpg,b,c\n", "t.csv:2: bad annotation: got 3 cells, expected 2"),
    "a quote without an end": (b'image,caption\na.jpg,"b\n' + b"x\n" * 90_000, "t.csv:.*(field larger|unexpected end)"),
    "not UTF-8": (b"image,caption\na.jpg,\xff\n", "t.csv:2: not UTF-8 text"),
    "no JSON": (b"image,boxes,labels\na.jpg,1 2 3 4,\"[\"\"a\"\"]\"\n", "t.csv:2: bad annotation: Expected `array | null`, got `str`.*boxes"),
    "no image": (b"image,caption\n,b\n", "t.csv:2: bad annotation: got no image, expected a path"),
    "out of the folder": (b"image,caption\n../a.jpg,b\n", "../a.jpg: bad annotation: expected a path below"),
    "a null in the path": (b"image,caption\na\0.jpg,b\n", "bad annotation|line contains NUL"),
    "a line too long": (b"image,caption\n" + b"x" * (columns.MAX_LINE + 1), "got a line of over"),
}  # fmt: skip


@pytest.mark.parametrize("what", OF_CSV)
def test_csv(tmp_path, what):
    content, line = OF_CSV[what]
    (tmp_path / "t.csv").write_bytes(content)
    cases.check(run(tmp_path, "csv", tmp_path / "t.csv"), line)


def test_many_boxes_of_one_image_in_rows(monkeypatch):
    monkeypatch.setattr(columns, "MAX_REGIONS", 5)
    row = lambda: {"image": "a.jpg", "boxes": [[1, 1, 9, 9]], "labels": ["bird"]}
    ((_, joined),) = columns._joined((f"t.csv:{n}", row()) for n in range(20_001))
    assert len(joined["boxes"]) == len(joined["labels"]) == 6  # no more than it needs to tell


FLAGS = [
    (["--label-text=x", "--source=coco"], "--label-text: got 'x', expected one {} in the place of the label"),
    (["--label-text={}"], "--label-text: got no --source"),
    (["--option", "a=b"], "--option: got no --source"),
    (["--source=folder", "--label-text={}"], "--label-text: the regions of source folder have descriptions, no labels"),
    (["--source=coco"], "source coco: got no --images"),
    (["--source=parquett"], "did you mean parquet"),
    ([], "--annotations: got 0 files, expected A.jsonl; or name a --source"),
    (["--annotations=A.jsonl"], "--images DIR: missing"),
]  # fmt: skip


@pytest.mark.parametrize("words,line", FLAGS)
def test_flags_that_do_not_fit(tmp_path, words, line):
    images = [f"--images={tmp_path}"] if "folder" in str(words) else []
    given = [*words, *images, f"--output={tmp_path}", "--name=x"]
    cases.check(cases.run(build.main, given), line)
