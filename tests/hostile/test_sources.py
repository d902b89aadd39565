"""What hostile annotation files do to the readers of public formats: a named fault or one line, in time."""

import os

import pytest

from grain_jax.core import errors
from grain_jax.data import sources
from grain_jax.data.sources import json_files
from tests.data import test_sources

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
