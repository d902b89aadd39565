"""Hostile tables: Parquet, folders of `datasets`, CSV. What is wrong is one line, of the file or of a row."""

import pyarrow as pa
import pyarrow.parquet
import pytest

from grain_jax.core import errors
from grain_jax.data import build, sources
from grain_jax.data.sources import columns
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
