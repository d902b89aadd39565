"""`grain-jax inspect`: its numbers, the problems that it finds, and its page."""

import json
import re
import shutil

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
    assert [of_kind["count"] for of_kind in result["texts"].values()] == [80, 40, 60]
    assert result["texts"]["synthetic"] == {"count": 40, "mean_tokens": 6.75, "p99_tokens": 7}
    assert result["regions"]["count"] == 60  # images have 0, 1, 2, 3, 0 ... regions
    # No other problem is found in a good set; a quarter has no regions, on purpose.
    assert set(problems_of(result)) == {"images without regions"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("images        40; ")
    assert printed[-1] == f"{tmp_path}: inspect.html, statistics.json"
    assert (tmp_path / "inspect.html").read_text().count("<figure>") == 5
    # The annotations give the same.
    again = inspect(record_set / "in" / "A.jsonl", tmp_path / "annotations")
    for key in ("regions", "images", "texts"):
        assert result[key] == again[key]


def test_planted_problems_are_found(tmp_path):
    lines = record_sets.write_annotations(tmp_path / "in", 60, size=(100, 100))

    def region(description, box=(10, 10, 60, 60)):
        return {"box": box, "score": 0.5, "description": description}

    lines[0]["synthetic_caption"] = "I'm sorry, but I cannot see the image."
    lines[3]["regions"] = [region("a speck", [5, 5, 8, 8])]
    lines[4]["regions"] = [region("all of it", [0, 0, 100, 100])]
    lines[6]["regions"] = [region(" ".join(["long"] * 30))]
    lines[7]["caption"] = " ".join(["word"] * 90)
    lines[7]["captions"] = ["I'm sorry, I can't."]  # no model wrote it
    lines[8]["regions"] = [region("inverted", [50, 5, 20, 90])]
    for key in ("caption", "captions", "synthetic_caption"):
        del lines[9][key]
    for line in lines[40:50]:
        line["regions"] = [region("the main subject")]
    (tmp_path / "in/A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [tmp_path / f"in/{number:05d}.png" for number in range(16)]
    files[14].write_bytes(files[13].read_bytes())
    files[15].write_bytes(files[15].read_bytes()[:60])
    result = inspect(tmp_path / "in" / "A.jsonl", tmp_path / "out")
    problems_found = problems_of(result)
    expected = {
        "refusals of a model": 1,
        "boxes under 0.1% of their image": 4,
        "boxes of 95% of their image or more": 5,
        "description texts over 24 tokens": 7,
        "web texts over 77 tokens": 8,
        "faulty: bad annotation": 9,
        "images without any caption": 10,
        "images that are copies, byte by byte, of earlier ones": 15,
        "faulty: unreadable": 16,
    }
    for name, line in expected.items():
        problem = problems_found.pop(name)
        assert problem["count"] == 1 and problem["advice"], name
        assert re.match(rf"A.jsonl:{line}\b", problem["example"]), name
    common = problems_found.pop("images that share one description text (over 10% of all)")
    assert (common["count"], common["example"]) == (10, "'the main subject'")
    assert list(problems_found) == ["images without regions"]
    assert result["images"]["left_out"] == 2


def test_boxes_that_are_all_shares_are_a_problem(tmp_path):
    lines = record_sets.write_annotations(tmp_path / "in", 4)
    share = {"box": [0.25, 0, 0.5, 1], "description": "x", "score": 1}
    what = "boxes that all lie in [0, 1], as shares of width and height do"
    for pixels in ([], record_sets.annotation(1)["regions"]):
        for line in lines:
            line["regions"] = [share]
        lines[3]["regions"] += pixels
        (tmp_path / "in/A.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        problem = problems_of(inspect(tmp_path / "in" / "A.jsonl", tmp_path / "out")).get(what)
        assert problem is None if pixels else problem["count"] == 4
    assert "--option unit=share" in statistics._ADVICE[what]


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


def test_a_folder_without_the_images_is_one_line_and_status_2(record_set, capsys):
    assert command.main([f"{record_set}/in/A.jsonl", f"--images={record_set}/nothing"]) == 2
    printed = capsys.readouterr().err.strip()
    assert "none of 40 images could be read; A.jsonl:1: there is no" in printed
    assert "\n" not in printed


def test_each_set_has_its_own_page(record_set, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(record_set / "out/tiny_set", tmp_path / name)
    assert command.main([f"{tmp_path}/a"]) == command.main([f"{tmp_path}/b/1.0.0"]) == 0
    pages = sorted(x.relative_to(tmp_path).as_posix() for x in tmp_path.rglob("inspect.html"))
    assert pages == ["inspect-a/inspect.html", "inspect-b/inspect.html"]
