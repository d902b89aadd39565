"""What hostile annotation files do to the readers of public formats: a named fault or one line, in time."""

import pytest

from grain_jax.core import errors
from grain_jax.data import sources
from tests.data import test_sources


def test_entities_of_a_stranger(tmp_path):
    options = test_sources.flickr30k_entities_sample(tmp_path)
    sentences, boxes = tmp_path / "Sentences", tmp_path / "Annotations"
    many = "".join(f"[/EN#1/x a{n}] " for n in range(3000))
    box = "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
    objects = f"<object><name>1</name><bndbox>{box}</bndbox></object>"
    (sentences / "3.txt").write_text(many)
    (boxes / "3.xml").write_text(f"<annotation>{objects * 500}</annotation>")
    (sentences / "4.txt").write_text("[/EN#1/" * 9000)
    lol = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    (boxes / "5.xml").write_text(f'<!DOCTYPE x [<!ENTITY l0 "lol">{lol}]><x>&l9;</x>')
    (boxes / "6.xml").write_text('<?xml version="1.0" encoding="nonsense"?><a/>')
    (boxes / "7.xml").write_text("<a>" * 15_000)
    items = test_sources.read_all("flickr30k_entities", options)
    faults = {item.image: item.detail for item in items if isinstance(item, sources.Fault)}
    assert sorted(faults) == ["3.jpg", "5.jpg", "6.jpg", "7.jpg"]
    assert "at most 10,000 boxes" in faults["3.jpg"]


@pytest.mark.parametrize(
    "content, line",
    [
        (b"\x80\x02]r\x00\x00\x00\x7f.", "got no images"),  # the index of 2 billion objects
        (b"(" * 200_000 + b"l" * 200_000 + b".", "Expected `object`, got `array`|nested too deep"),
        (b"cos\nsystem\n(S'true'\ntR.", "no pickle of plain values .it wants os.system"),
    ],
)
def test_pickles_of_a_stranger(tmp_path, content, line):
    options = test_sources.refcoco_sample(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(content)
    with pytest.raises(errors.UserError, match=line) as error:
        test_sources.read_all("refcoco", options)
    assert "\n" not in str(error.value)


def test_a_saved_folder_names_no_file_elsewhere(tmp_path):
    options = test_sources.hf_dataset_sample(tmp_path)
    (tmp_path / "saved/train/state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    with pytest.raises(errors.UserError, match="got the name '../x', expected a path below"):
        sources.shards("hf-dataset", options)
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["../.."]}')
    with pytest.raises(errors.UserError, match="expected a path below"):
        sources.shards("hf-dataset", options._replace(split="../.."))
