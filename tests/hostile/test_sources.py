"""What hostile annotation files do to the readers of public formats: a named fault or one line, in time."""

import json
import os
import pathlib
import pickle
import re

import pytest

from grain_jax.core import errors
from grain_jax.data import sources
from grain_jax.data.sources import json_files
from tests.data import test_sources
from tests.hostile import source_files

pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")

DEEP = b"[" * 100_000
JSON_SOURCES = ("coco", "finehard", "fg_ovd", "karpathy", "lvis", "refcoco", "visual_genome")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    return folder, source_files.write(folder)


read = test_sources.read_all


def places(value, path=()):
    """The path of every part of a JSON value; of a list the first part stands for the others."""
    yield path
    first = dict(enumerate(value[:1])) if isinstance(value, list) else {}
    for key, part in (value if isinstance(value, dict) else first).items():
        yield from places(part, (*path, key))


def put(value, path, new):
    """`value` with another part at the path."""
    if not path:
        return new
    out = value.copy()
    out[path[0]] = put(value[path[0]], path[1:], new)
    return out


WRONG = (None, [1], {"a": {}}, True, -1, 1.5, 10**400, float("nan"), "", "../../x", "\ud800\0\x1b[2J")  # fmt: skip


def dump_json(value):
    """JSON as a hostile writer would: NaN and lone surrogates stay in it."""
    return json.dumps(value).encode()


@pytest.mark.parametrize("name", [*JSON_SOURCES, "annotations"])
def test_every_value_replaced_by_one_of_another_type(samples, name):
    folder, options = samples[0] / name, samples[1][name]
    good = len(read(name, options))
    refused = named = 0
    for path in source_files.annotation_files(folder, options):
        before = path.read_bytes()
        lines = path.suffix == ".jsonl"
        load, dump = (
            (pickle.loads, pickle.dumps) if path.suffix == ".p" else (json.loads, dump_json)
        )
        value = [load(x) for x in before.split(b"\n\n")] if lines else load(before)
        for place in places(value):
            for wrong in WRONG:
                changed = put(value, place, wrong)
                if lines and isinstance(changed, list):
                    path.write_bytes(b"\n".join(map(dump_json, changed)))
                else:
                    try:
                        path.write_bytes(dump(changed))
                    except UnicodeEncodeError:  # no pickle has it
                        continue
                try:
                    items = read(name, options)
                except errors.UserError as error:
                    refused += 1
                    assert len(str(error).splitlines()) == 1 and str(path) in str(error)
                    assert str(error).isprintable()
                    continue
                faults = [x for x in items if isinstance(x, sources.Fault)]
                faults += [y for x in items if isinstance(x, sources.Image) for y in x.left_out]
                named += bool(faults)
                assert {x.cause for x in faults} <= set(sources.CAUSES)
                assert len(items) >= good - 1 or faults
        path.write_bytes(before)
    assert refused + named > 50 and len(read(name, options)) == good


def _link(path):
    path.symlink_to("/dev/zero")


WHOLE = {
    "deep": (lambda path: path.write_bytes(DEEP), "deep|got|object|array"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "truncated|list|malformed"),
    "empty": (lambda path: path.write_bytes(b""), "truncated|got ''"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "got a folder, pipe or device"),
    "without an end": (lambda path: (path.unlink(), _link(path)), "got a folder, pipe or device"),
    "gone": (lambda path: path.unlink(), "no such file"),
}


@pytest.mark.parametrize("how", WHOLE)
def test_a_faulty_file_is_one_line(tmp_path, how):
    found = source_files.write(tmp_path, *JSON_SOURCES)
    change, line = WHOLE[how]
    for name in JSON_SOURCES:
        path = pathlib.Path(found[name].annotations[-1])
        if path.is_dir():
            path = path / "2024_results_0.json"
            found[name] = found[name]._replace(annotations=(str(path),))
        change(path)
        try:  # an item of a list is a fault of its own
            items = read(name, found[name])
            (said,) = (f"{x.image}: {x.detail}" for x in items if isinstance(x, sources.Fault))
        except sources.SourceError as error:
            said = str(error)
        assert re.search(f"{path}.*(?:{line})", said) and len(said.splitlines()) == 1


def test_files_beside_images_and_folders_that_contain_themselves(tmp_path):
    options = test_sources.folder_sample(tmp_path)
    images = tmp_path / "images"
    for number, make in enumerate(
        (os.mkfifo, _link, lambda path: path.write_bytes(bytes(2 << 20)))
    ):
        path = images / f"{number:05d}.txt"
        path.unlink()
        make(path)
    for number in range(9):
        (images / f"loop{number}").symlink_to(images)
    faults = [x for x in read("folder", options) if isinstance(x, sources.Fault)]
    assert [x.image for x in faults[:3]] == [f"0000{n}.jpg" for n in range(3)]
    assert all("expected a caption" in x.detail for x in faults[:3])
    assert {x.image: x.cause for x in faults[3:]} == {f"loop{n}": "unreadable" for n in range(9)}


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
        (b"]" * 9, "no pickle of plain values"),
        (pickle.dumps([{"split": {1: 2}}]), "missing required field|Expected `str`"),
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
