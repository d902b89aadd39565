"""Folders of embeddings from strangers, and mixed-up ones: each fault is one line, and no name in one is followed."""

import json
import re
import shutil

import numpy as np
import pytest

from grain_jax.core import errors
from grain_jax.data.embed import embeddings, parts, search
from grain_jax.data.embed import search_command as command
from tests.hostile import indexes

PART = "data/part-00001-of-00003.parquet"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return indexes.write(tmp_path_factory.mktemp("index"))


@pytest.fixture
def folder(good):
    with indexes.kept(good):
        yield good


def note(**changes):
    return lambda folder: indexes.rewrite(folder, 1, note=lambda said: said | changes)


def settings(**changes):
    return lambda folder: indexes.in_settings(folder, lambda said: said | changes)


def of_another(**changes):
    """A part whose own settings are other ones."""
    return lambda folder: indexes.rewrite(
        folder, 1, note=lambda said: said | {"settings": said["settings"] | changes}
    )


def of_columns(name):
    return lambda folder: indexes.rewrite(folder, 1, indexes.COLUMNS[name])


def special(path, how):
    return lambda folder: indexes.replaced(folder, path, how)


def written(content):
    return lambda folder: (folder / PART).write_bytes(content)


def copied(folder):
    shutil.copy(folder / indexes.name(0), folder / PART)


def renamed_inside(folder):
    """A copy whose note has the name that the file has."""
    copied(folder)
    indexes.rewrite(folder, 1, note=lambda said: said | {"name": PART.rpartition("/")[2]})


def renumbered(folder):
    (folder / PART).rename(folder / "data" / "part-00001-of-00004.parquet")


NOT_REGULAR = "got a folder, pipe or device"
OTHER = "has other columns than settings.json says"
DEEP = [indexes.element(b"s", 1), *[indexes.element(b"g", 1)] * 10**5, indexes.element(b"a")]
WIDE = [indexes.element(b"s", 10**5), *[indexes.element(b"a")] * 10**5]
ONE = [indexes.element(b"s", 1), indexes.element(b"a")]
# (name, change, what opening and searching says; and what going on says, None: it makes the part anew)
ROWS = [
    ("another model", of_another(model={"model": "", "params": "other"}), r"made with model stand-in \(parameters other\), expected stand-in", "same"),
    ("another source", of_another(source={"kind": "tars", "path": "", "images": "", "split": "", "digest": "x"}), "made with source", "same"),
    ("another type of activations", of_another(dtype="bfloat16"), 'made with dtype "bfloat16", expected "float32"', "same"),
    ("copied over another", copied, "is 'part-00000-of-00003.parquet' under another name", "same"),
    ("copied, with the other's name", renamed_inside, "has the images of part-00000-of-00003", "made of other images: got '0-x'"),
    ("of another number of files", renumbered, "expected files of this job alone", "same"),
    ("images' digest", note(images="0"), "made of other images than those of '1-x'", "same"),
    ("no note", note(name=None), r"Expected `str`, got `null` - at `\$.name`", "same"),
    ("most regions -1", note(most_regions=-1), "`int` >= 0", "same"),
    ("most regions too few", note(most_regions=1), "damaged .over 1 regions", 3),
    ("unknown reader", note(source={"reader": "x"}), "Invalid value 'x'", "same"),
    ("NUL in a path", note(source={"reader": "webdataset", "name": "1-x", "size": 4, "tar": "a\0", "prefix": ""}), "matching regex", "same"),
    *((name, of_columns(name), OTHER, "same") for name in ("half the width", "twice the width", "regions of half the width", "float64", "lists of any length", "null", "null id", "a column less", "a column more", "another order")),
    ("NaN", of_columns("NaN"), "damaged .numbers of an embedding are not finite", 3),
    ("NaN in a region", of_columns("NaN in a region"), "damaged .numbers of an embedding are not finite", 3),
    ("infinite", of_columns("infinite"), "damaged .numbers of an embedding are not finite", 3),
    ("a box outside", of_columns("a box outside"), r"damaged .a box is not in \[0, 1\]", 3),
    ("a box of NaN", of_columns("a box of NaN"), r"damaged .a box is not in \[0, 1\]", 3),
    ("a box too few", of_columns("a box too few"), "damaged .a region without a box", 3),
    ("no width", of_columns("no width"), "damaged .an image without pixels", 3),
    ("compressed", lambda folder: indexes.rewrite(folder, 1, compression="zstd"), "is compressed, expected plain columns", "same"),
    ("a FIFO", special(PART, "fifo"), NOT_REGULAR, "same"),
    ("a device", special(PART, "/dev/zero"), NOT_REGULAR, "same"),
    ("a folder", special(PART, "folder"), NOT_REGULAR, "same"),
    ("settings: a FIFO", special("settings.json", "fifo"), NOT_REGULAR, "same"),
    ("settings: a device", special("settings.json", "/dev/zero"), NOT_REGULAR, "same"),
    ("settings: a folder", special("settings.json", "folder"), NOT_REGULAR, "same"),
    ("settings: a list", lambda folder: indexes.in_settings(folder, lambda said: [said]), "Expected `object`, got `array`", "same"),
    ("settings: deep", lambda folder: (folder / "settings.json").write_text("[" * 10**5), "expected settings of a folder", "same"),
    ("settings: a text as D", settings(embed_dim="8"), r"Expected `int`, got `str` - at `\$.embed_dim`", "same"),
    ("settings: another D", settings(embed_dim=16), "made with embed_dim 8, expected 16", "begun with embed_dim 16, got 8"),
    ("settings: 10^12 files", settings(parts=10**12), "`int` <= 10000000", "same"),
    ("no Parquet", written(b"x" * 100), "damaged .a footer of 2,021,161,080 bytes", None),
    ("empty", written(b""), "damaged .Parquet file size is 0 bytes", None),
    ("a footer of 4 GB", written(b"PAR1" + b"\xff" * 4 + b"PAR1"), "damaged .a footer of 4,294,967,295 bytes", None),
    ("10^5 groups deep", written(indexes.footer(DEEP)), "damaged .Couldn't deserialize thrift", None),
    ("10^5 columns", written(indexes.footer(WIDE)), "damaged .Couldn't deserialize thrift", None),
    ("2^62 rows", written(indexes.footer(ONE, 2**62)), "expected a file of grain-jax embed; move it elsewhere", "same"),
]  # fmt: skip


@pytest.mark.parametrize(
    "change, said, going_on", [row[1:] for row in ROWS], ids=[x[0] for x in ROWS]
)
def test_each_fault_is_one_line(change, said, going_on, folder):
    change(folder)
    with pytest.raises(errors.UserError) as error:
        indexes.search(folder)
    assert re.search(said, str(error.value)) and "\n" not in str(error.value)
    if isinstance(going_on, str):
        again = said if going_on == "same" else going_on
        with pytest.raises(errors.UserError, match=again) as error:
            indexes.resume(folder)
        assert "\n" not in str(error.value)
    else:
        assert indexes.resume(folder) == (going_on or 2)
    assert (folder / PART).is_file() == (going_on is not None) or change in _MOVED


_GONE = ("a FIFO", "a device", "a folder", "of another number of files")
_MOVED = [row[1] for row in ROWS if row[0] in _GONE]


@pytest.mark.parametrize(
    "note, path, said",
    [
        ({"images": "gs://nobody/x"}, "a.png", "lies at gs://nobody/x, and nothing that a file names"),
        ({"images": "hf://nobody/x"}, "a.png", "lies at hf://nobody/x"),
        ({"images": "/gs/nobody/x"}, "a.png", "lies at /gs/nobody/x"),  # epath's own name of gs://
        ({"images": "/"}, "gs/nobody/x.png", "lies at /"),
        ({"images": "{}"}, "../secret.png", "expected a path below the images' folder"),
        ({"images": "{}"}, "{}/../secret.png", "expected a path below the images' folder"),
        ({"reader": "webdataset", "tar": "gs://nobody/x.tar", "prefix": "a"}, "a/b.png", "lies at gs:"),
        ({"reader": "webdataset", "tar": "/dev/zero", "prefix": "a"}, "a/b.png", "there is no /dev/zero"),
        ({"reader": "tfds", "directory": "gs://nobody/x", "split": "train", "start": 0, "stop": 9}, "train/3.jpg", "lies at gs:"),
        ({"reader": "tfds", "directory": "{}", "split": "train", "start": 0, "stop": 9}, "train/9.jpg", "got number 9"),
        ({"reader": "tfds", "directory": "{}", "split": "train", "start": 0, "stop": 9}, "x.jpg", "invalid literal"),
    ],
)  # fmt: skip
def test_images_are_read_from_this_machine_and_from_below_their_folder(note, path, said, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    place = str(tmp_path / "images")
    piece = {"reader": "annotations", "name": "0", "orientation": "file"}
    piece |= {key: value.replace("{}", place) if key in ("images", "directory") else value for key, value in note.items()}  # fmt: skip
    ((_, fault),) = parts.read_again([(piece, path := path.replace("{}", place))]).items()
    assert said in fault.detail and fault.image == path


def test_a_tar_of_the_users_folder_lies_in_it(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "secret.tar").write_bytes(b"")
    piece = {"reader": "webdataset", "name": "0", "tar": "", "prefix": "../secret"}
    ((_, fault),) = parts.read_again([(piece, "a")], str(tmp_path / "x")).items()
    assert "got the name '../secret.tar', expected a path below" in fault.detail


@pytest.mark.parametrize("checkpoint", ["hf://nobody/x", "gs://nobody/x", "/gs/nobody/x"])
def test_the_model_that_an_index_names_is_not_fetched(checkpoint, folder, capsys):
    settings(checkpoint=checkpoint)(folder)
    assert command.main([str(folder), "--text=a"]) == 2
    said = f"was made by {checkpoint}, and nothing that a file names is fetched; give --checkpoint"
    assert said in capsys.readouterr().err


def test_names_are_escaped_in_messages_and_pages(folder, monkeypatch, tmp_path, capsys):
    evil = "\x1b[2J<b>\u202e.png"
    rename = indexes.column("path", lambda x: indexes.pa.array([evil] * len(x)))
    for part in range(indexes.FILES):
        indexes.rewrite(folder, part, rename)
    query = np.zeros((1, indexes.D), np.float32)
    answer = search.search
    monkeypatch.setattr(search, "search", lambda index, *_, **__: answer(index, query, top=3))
    monkeypatch.setattr(search.Index, "model", None)
    assert command.main([str(folder), "--text=a", f"--output={tmp_path / 'a.html'}"]) == 0
    said, text = capsys.readouterr(), (tmp_path / "a.html").read_text()
    assert "\\x1b[2J<b>\\u202e.png: no such file" in said.err
    assert "\\x1b[2J&lt;b&gt;\\u202e.png" in text
    for shown in (*said, text):
        assert "\x1b" not in shown and "\u202e" not in shown
    assert command.escape("a" * 10**6) == "a" * 397 + "..."


def test_a_list_of_images_that_is_a_pipe_or_a_link(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "other").write_text("mine")
    (out / "images.jsonl.new").symlink_to(tmp_path / "other")
    given = dict(images=None, split="", shard_size=4, scratch=embeddings.epath.Path(out))
    find = lambda: parts.find(str(tmp_path / "images"), **given)
    assert find().total == 1 and (tmp_path / "other").read_text() == "mine"
    assert json.loads((out / "images.jsonl").read_text()) == {"image": "a.png"}
    indexes.replaced(out, "images.jsonl", "fifo")
    with pytest.raises(errors.UserError, match="images.jsonl: got a folder, pipe or device"):
        find()
