"""`grain-jax inspect`: its numbers, the problems that it finds, and its page."""

import json
import re

import pytest

from grain_jax.data.inspect import __main__ as command
from grain_jax.data.inspect import statistics
from tests import record_sets

# TFDS 4.9.10 asks protobuf for a field's label; protobuf 6 has another name for it.
pytestmark = pytest.mark.filterwarnings("ignore:label:DeprecationWarning")


@pytest.fixture(scope="module")
def record_set(tmp_path_factory):
    """40 images of 16 x 12 in 8 shards."""
    folder = tmp_path_factory.mktemp("inspect")
    record_sets.write_annotations(folder / "in", 40)
    assert record_sets.build_set(folder / "in", folder / "out", "--num-shards=8") == 0
    return folder


def inspect(path, output, *arguments):
    assert command.main([str(path), f"--output={output}", *arguments]) == 0
    return json.loads((output / "statistics.json").read_text())


def problems_of(result):
    return {problem["what"]: problem for problem in result["problems"]}


def test_numbers_of_a_record_set(record_set, tmp_path, capsys):
    result = inspect(record_set / "out" / "tiny_set", tmp_path, "--num-images=5")
    assert result["images"]["count"] == 40 and result["images"]["left_out"] == 0
    assert result["images"]["sizes"] == [["16 x 12", 40]]
    web, synthetic, description = (result["texts"][kind] for kind in result["texts"])
    assert (web["images"], web["tokens"]["count"], synthetic["images"]) == (40, 80, 40)
    assert (description["images"], description["copies"]["different"]) == (30, 60)
    # Images have 0, 1, 2, 3, 0 ... regions: halves, then a box of 4 x 4.
    regions = result["regions"]
    assert regions["count"] == 60 and regions["per_image"]["mean"] == 1.5
    assert (regions["area_per_mille"]["min"], regions["area_per_mille"]["max"]) == (83, 500)
    # No other problem is found in a good set; a quarter has no regions, on purpose.
    assert set(problems_of(result)) == {"images without regions"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("images        40; ")
    assert printed[-1] == f"{tmp_path}: inspect.html, statistics.json"
    assert (tmp_path / "inspect.html").read_text().count("<figure>") == 5
    # The annotations give the same.
    again = inspect(record_set / "in" / "A.jsonl", tmp_path / "annotations")
    for key in ("regions", "images"):
        assert result[key] == again[key]
    for kind, texts in result["texts"].items():
        assert texts["tokens"] == again["texts"][kind]["tokens"]


def plant(folder):
    """60 lines, of which some have a problem each; returns what is to be found, by line number."""
    lines = record_sets.write_annotations(folder, 60, size=(100, 100))
    box = {"box": [10, 10, 60, 60], "score": 0.5}

    def region(description, **fields):
        return box | {"description": description} | fields

    lines[0]["synthetic_caption"] = "I'm sorry, but I cannot see the image."
    lines[1]["regions"] = [region("As an AI language model, I can't tell")]
    lines[2]["regions"] = [region("1. a red wing")]
    lines[3]["regions"] = [region("a speck", box=[5, 5, 8, 8])]
    lines[4]["regions"] = [region("all of it", box=[0, 0, 100, 100])]
    lines[5]["regions"] = [region("a red wing"), region("A  red wing")]
    lines[6]["regions"] = [region(" ".join(["long"] * 30))]
    lines[7]["caption"] = " ".join(["word"] * 90)
    lines[8]["regions"] = [region("inverted", box=[50, 5, 20, 90])]
    for key in ("caption", "captions", "synthetic_caption"):
        del lines[9][key]
    lines[9]["regions"] = []
    lines[11]["caption"] = lines[10]["caption"]
    for line in lines[40:50]:
        line["regions"] = [region("the main subject")]
    (folder / "A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "00014.png").write_bytes((folder / "00013.png").read_bytes())
    (folder / "00015.png").write_bytes((folder / "00015.png").read_bytes()[:60])
    return {
        "refusals among synthetic captions": 1,
        "refusals among descriptions": 2,
        "descriptions with list marks or a preamble": 3,
        "boxes under 0.1% of their image": 4,
        "boxes of 95% of their image or more": 5,
        "descriptions that their image has already": 6,
        "descriptions over 24 tokens": 7,
        "web captions over 77 tokens": 8,
        "faulty: regions.box": 9,
        "lines without any caption or region": 10,
        "web captions that another image has too": 12,
        "images that cannot be read": 16,
    }


def test_planted_problems_are_found(tmp_path):
    expected = plant(tmp_path / "in")
    result = inspect(tmp_path / "in" / "A.jsonl", tmp_path / "out")
    problems_found = problems_of(result)
    for name, line in expected.items():
        assert problems_found[name]["count"] == 1 and problems_found[name]["advice"], name
        assert re.match(rf"A.jsonl:{line}\b", problems_found[name]["example"]), name
    assert problems_found["images that cannot be read"]["total"] == 57
    common = problems_found["images that share one description text (over 10% of all)"]
    assert (common["count"], common["total"], common["example"]) == (10, 57, "'the main subject'")
    copies = problems_found["images that are copies, byte by byte, of earlier ones"]
    assert (copies["count"], copies["example"]) == (1, "id14 is id13")
    assert len(problems_found) == len(expected) + 2
    assert result["images"]["left_out"] == 3


@pytest.mark.parametrize(
    "kind,text,tokens,flaws_expected",
    [
        ("synthetic", "i'm sorry, i can't help with that", 12, ["refusal in"]),
        ("web", "i'm sorry, i can't help with that", 12, []),
        ("description", "- a red wing", 6, ["markup in"]),
        ("description", "a wing", 25, ["long"]),
        ("web", "a wing", 78, ["cut"]),
        ("synthetic", "a caption", 77, []),
    ],
)
def test_flaws_of_texts(kind, text, tokens, flaws_expected):
    assert statistics.flaws(kind, text, tokens) == flaws_expected


def test_the_page_loads_nothing_and_trusts_no_text(tmp_path, capsys):
    lines = record_sets.write_annotations(tmp_path, 8)
    evil = "<script>alert(1)</script> & \"quoted\" 'too' \x1b[2J"
    for key in ("caption", "id"):
        lines[3][key] = evil
    lines[3]["regions"][0] |= {"description": evil, "negatives": ["the <b>", "b", "c", "d"]}
    lines[5]["caption"] = evil
    (tmp_path / "A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    inspect(tmp_path / "A.jsonl", tmp_path / "out", "--num-images=8")
    text = (tmp_path / "out" / "inspect.html").read_text()
    assert "<script" not in text and "\x1b" not in text + capsys.readouterr().out
    assert text.count('<img src="data:image/jpeg;base64,') == text.count(" src=") == 8
    assert "not: the &lt;b&gt;, b, c, d<" in text
    assert not re.search(r"https?:|url\(", text)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["{}/in"], "got no dataset_info.json there, expected a TFDS set"),
        (["{}/in/A.jsonl", "--images={}/nothing"], "no such folder"),
        (["{}/in/A.jsonl", "--output={}/in/A.jsonl"], "A.jsonl"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(record_set, capsys, arguments, message):
    assert command.main([argument.format(record_set) for argument in arguments]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and message in printed[0]
