import io
import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest

from grain_jax.data.inspect import __main__ as command
from grain_jax.data.inspect import counting, panels, problems, reading, sheet, statistics
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
    status = command.main([str(path), f"--output={output}", *arguments])
    assert status == 0
    return json.loads((output / "statistics.json").read_text())


def found(result):
    return {problem["what"]: problem for problem in result["problems"]}


def test_numbers_of_a_record_set(record_set, tmp_path, capsys):
    result = inspect(record_set / "out" / "tiny_set", tmp_path, "--num-images=5", "--lanes=3")
    assert result["pictures"]["count"] == 40 and result["pictures"]["left_out"] == 0
    assert result["pictures"]["sizes"] == [["16 x 12", 40]]
    assert result["pictures"]["formats"] == {"PNG": 40}
    captions = result["captions"]
    assert captions["web"]["words"]["count"] == 80
    assert captions["web"]["words"]["histogram"] == [[5, 5, 80]]
    assert captions["synthetic"]["words"]["histogram"] == [[4, 4, 40]]
    assert captions["pictures_with_web"] == captions["pictures_with_synthetic"] == 40
    # Images have 0, 1, 2, 3, 0 ... regions: halves, then a box of 4 x 4.
    regions = result["regions"]
    assert regions["count"] == 60
    assert regions["per_picture"]["histogram"] == [[0, 0, 10], [1, 1, 10], [2, 2, 10], [3, 3, 10]]
    assert regions["per_picture"]["mean"] == 1.5
    halves, small = 50, 10
    assert result["boxes"]["area_histogram"][-1] == [0.3, 1.0, halves]
    assert result["boxes"]["area_histogram"][-3] == [0.03, 0.1, small]
    # The left half (30 boxes) and the small box (10) cover the cell at (x, y) = (0.2, 0.2).
    places = np.array(result["boxes"]["places"])
    assert places[5, 5] == round(40 / 60, 4)
    assert places[0, 0] == round(30 / 60, 4)
    assert places[0, 23] == 0 and places[12, 23] == round(20 / 60, 4)
    scores = result["scores"]
    assert scores["count"] == 60 and scores["min"] == 0.5
    assert scores["max"] == pytest.approx(0.7)
    assert scores["mean"] == pytest.approx((30 * 0.5 + 20 * 0.6 + 10 * 0.7) / 60)
    shards = result["set"]["shards"]
    assert (shards["count"], shards["smallest"], shards["largest"]) == (8, 5, 5)
    assert shards["records_per_lane"] == [10, 15]
    # No other problem is found in a good set; a quarter has no regions, on purpose.
    uneven = "uneven lanes (input.lanes=3): some records are seen more often"
    assert set(found(result)) == {"images without regions", uneven}
    assert found(result)[uneven]["example"] == "lanes have 10 to 15 records"
    assert result["contact_sheet"] == {"shown": 5, "damaged": 0}
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("images        40; ")
    assert printed[-1].endswith("inspect.html, statistics.json, contact_sheet.png")

    # The annotations give the same, but for examples, which are the first ones: TFDS shuffles.
    again = inspect(record_set / "in" / "A.jsonl", tmp_path / "annotations")
    assert again["set"]["kind"] == "annotations"
    for one in (result, again):
        for texts in (
            *(one["captions"][kind] for kind in ("web", "synthetic")),
            one["descriptions"],
        ):
            del texts["distinct"]["examples"]
    for key in ("captions", "descriptions", "regions", "boxes"):
        assert result[key] == again[key]
    assert result["scores"]["histogram"] == again["scores"]["histogram"]


def test_negatives_are_counted_and_shown(tmp_path, capsys):
    lines = record_sets.write_annotations(tmp_path, 4)
    lines[3]["regions"][1]["negatives"] = ["the <right> part", "the top", "the whole", "the rest"]
    lines[3]["regions"][2]["negatives"] = ["the edge"]
    (tmp_path / "A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert record_sets.build_set(tmp_path, tmp_path / "out") == 0
    for path in (tmp_path / "A.jsonl", tmp_path / "out" / "tiny_set"):
        regions = inspect(path, tmp_path / "seen")["regions"]
        assert regions["with_negatives"] == 2 and regions["count"] == 6
        assert regions["negatives_per_region"]["histogram"] == [
            *([0, 0, 4], [1, 1, 1], [2, 2, 0], [3, 3, 0], [4, 4, 1])
        ]
        page = (tmp_path / "seen" / "inspect.html").read_text()
        assert "not: the &lt;right&gt; part, the top, the whole, and 1 more<" in page
        assert "Negatives a region" in page
        assert "negatives     5; 2 regions have some, up to 4 each" in capsys.readouterr().out


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
    record_sets.picture(12, (400, 100)).save(folder / "00012.png")
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
        "lines with faulty regions.box": 9,
        "lines without any caption or region": 10,
        "images over 3 times as long as wide, or the other way round": 13,
        "images that cannot be read": 16,
    }


def test_planted_problems_are_found(tmp_path):
    expected = plant(tmp_path / "in")
    result = inspect(tmp_path / "in" / "A.jsonl", tmp_path / "out")
    problem_of = found(result)
    for what, line in expected.items():
        assert problem_of[what]["count"] == 1, what
        assert problem_of[what]["example"].startswith(f"A.jsonl:{line}: "), what
        assert problem_of[what]["advice"]
    assert problem_of["images that cannot be read"]["of"] == 57
    common = problem_of["images that share one description (over 10% of all)"]
    assert (common["count"], common["of"]) == (10, 57)
    assert common["example"] == "'the main subject'"
    copies = problem_of["images that are copies, byte by byte, of earlier ones"]
    assert (copies["count"], copies["example"]) == (1, "id14 is id13")
    assert problem_of["web captions that another image has too"]["count"] == 1
    others = {"images without regions"}
    assert set(problem_of) - set(expected) - others == {
        "images that share one description (over 10% of all)",
        "images that are copies, byte by byte, of earlier ones",
        "web captions that another image has too",
    }
    assert result["pictures"]["left_out"] == 3


def item(**fields):
    encoded = io.BytesIO()
    record_sets.picture(1, (64, 32)).save(encoded, "PNG")
    return reading.Item(
        **{
            "name": "one",
            "where": "shard, record 0",
            "encoded": encoded.getvalue(),
            "format": "PNG",
            "size": (64, 32),
            "captions": ("a bird",),
            "synthetic_caption": "",
            "descriptions": ("a wing",),
            "boxes_xyxy": np.array([[0.25, 0.25, 0.75, 0.75]], np.float32),
            "scores": np.array([0.5], np.float32),
            "negatives": ((),) * len(fields.get("descriptions", " ")),
        }
        | fields
    )


def test_what_only_records_of_others_can_hold():
    stats = statistics.Statistics()
    boxes = [[-0.2, 0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.9], [0, 0, float("nan"), 1], [0, 0, 0.5, 0.5]]
    stats.add(
        [
            item(
                captions=("", "  "),
                descriptions=("a", "b", "c", " "),
                boxes_xyxy=np.array(boxes, np.float32),
                scores=np.array([1.5, 0.1, 0.2, np.nan], np.float32),
            )
        ]
    )
    assert {name: issue.count for name, issue in stats.issues.items()} == {
        "empty web caption": 2,
        "empty description": 1,
        "no caption": 1,
        "box outside": 1,
        "box without area": 2,
        "odd score": 2,
    }
    assert stats.areas.sum() == 2 and stats.scores.sum() == 2
    source = reading.Source("set", "TFDS records", iter(()), 1, (1,), {})
    names = [problem.what for problem in problems.find(stats, stats.result(source, lanes=1))]
    assert names[0] == "images without any caption"
    assert "boxes that leave their image" in names and "boxes without an area" in names


def test_damaged_and_missing_shards_do_not_stop_it(record_set, tmp_path):
    shutil.copytree(record_set / "out" / "tiny_set", tmp_path / "set")
    shards = sorted((tmp_path / "set" / "1.0.0").glob("*.tfrecord*"))
    content = bytearray(shards[2].read_bytes())
    content[len(content) // 2] ^= 255
    shards[2].write_bytes(content)
    shards[5].unlink()
    first = shards[6].read_bytes()
    length = int.from_bytes(first[:8], "little") + 16
    shards[6].write_bytes(first[length:])
    result = inspect(tmp_path / "set", tmp_path / "out")
    problem_of = found(result)
    damaged = problem_of["damaged shards, not read to their end"]
    assert damaged["count"] == 1 and shards[2].name in damaged["example"]
    assert shards[5].name in problem_of["missing shards"]["example"]
    other = problem_of["shards of another length than dataset_info.json says"]
    assert "got 4 records, expected 5" in other["example"]
    assert 30 - 1 <= result["pictures"]["count"] <= 40 - 1 - 5 - 1
    few = problem_of["fewer filled shards than the 16 lanes: training stops"]
    assert (few["count"], few["of"]) == (8, 16)


def test_padding_of_groups_that_are_all_alike():
    counted = counting.Padding()
    for _ in range(40):
        counted.add(40, [])
    by_group = {group["group"]: group for group in counted.result()["groups"]}
    assert set(by_group) == {1, 8, 16, 32}  # there are no 64 images
    assert counted.result()["unpacked"] == pytest.approx(1 - 40 / (6 * 77))
    for size, group in by_group.items():
        assert group["rows"] == size and group["padding"] == pytest.approx(37 / 77)
        assert group["overflowing"] == 0
        assert group["groups"] == 40 // size


def test_numbers_and_their_bars():
    numbers = counting.Numbers()
    numbers.add([3] * 50 + [4] * 45 + [5] * 4 + [90])
    result = numbers.result()
    assert (result["min"], result["median"], result["p95"], result["p99"]) == (3, 3, 4, 5)
    assert result["max"] == 90 and result["mean"] == pytest.approx(4.4)
    # The one beyond twice the 99% shares a bar with all of its kind.
    assert result["histogram"] == [[3, 3, 50], [4, 4, 45], [5, 5, 4], [6, 90, 1]]
    numbers.add(range(1000))
    result = numbers.result()
    assert len(result["histogram"]) <= counting.MANY_BARS
    assert sum(n for _, _, n in result["histogram"]) == result["count"] == 1100


def test_counts_beyond_their_limits():
    distinct, exact = counting.Distinct(limit=500), counting.Distinct()
    for number in range(20_000):
        name = str(number % 8_000)
        distinct.add(name.encode(), name)
        exact.add(name.encode(), name)
    assert exact.result()["distinct"] == 8_000 and exact.result()["copies"] == 12_000
    assert exact.result()["exact"] and not distinct.result()["exact"]
    assert len(distinct.held) <= 500
    assert distinct.result()["distinct"] == pytest.approx(8_000, rel=0.2)
    assert distinct.result()["copies"] == pytest.approx(12_000, rel=0.2)

    frequent = counting.Frequent(limit=100)
    for number in range(5_000):
        frequent.add(["often"] if number % 5 == 0 else [f"rare {number}"])
    (name, count), *_ = frequent.top(3)
    assert name == "often" and 1_000 - frequent.too_low_by <= count <= 1_000
    assert len(frequent.counts) <= 200

    drawn = []
    for order in (range(300), reversed(range(300))):
        sample = counting.Sample(10)
        for number in order:
            sample.add(str(number), number)
        drawn.append(sorted(sample.things()))
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 10


@pytest.mark.parametrize(
    "kind,text,tokens,flaws_expected",
    [
        ("synthetic", "i'm sorry, i can't help with that", 12, ["refusal in"]),
        ("web", "i'm sorry, i can't help with that", 12, []),
        ("synthetic", "a sign that says i'm sorry", 8, []),
        ("description", "as an ai, i cannot see it", 10, ["refusal in"]),
        ("description", "- a red wing", 6, ["markup in"]),
        ("description", "2) a red wing", 6, ["markup in"]),
        ("description", "sure, here are the features", 8, ["markup in"]),
        ("description", "3 white spots on the wing", 8, []),
        ("description", "a well-worn, white shirt", 8, []),
        ("description", "a wing", 25, ["long"]),
        ("description", "a wing", 78, ["cut"]),
        ("synthetic", "a caption", 77, []),
    ],
)
def test_flaws_of_texts(kind, text, tokens, flaws_expected):
    assert statistics.flaws(kind, text, tokens) == flaws_expected


def test_a_panel_has_its_boxes_in_place_by_score():
    made = panels.make(
        item(
            descriptions=("a low one", "a high one"),
            boxes_xyxy=np.array([[0, 0, 0.5, 0.5], [0.25, 0.25, 0.75, 0.75]], np.float32),
            scores=np.array([0.3, 0.9], np.float32),
        )
    )
    assert made.image.size == (300, 150)
    first, second = made.marks
    assert (first.number, first.description, first.score) == (1, "a high one", pytest.approx(0.9))
    assert first.box_xyxy == (75, 37.5, 225, 112.5) and second.box_xyxy == (0, 0, 150, 75)
    drawn = sheet.draw_boxes(made)
    assert drawn.getpixel((150, 112 - 1)) == (0xD6, 0x27, 0x28)  # its lower edge
    assert panels.make(item(encoded=b"no picture")) is None


def test_numbers_of_many_boxes_do_not_cover_each_other():
    boxes = [[10 + i, 10 + i, 60 + i, 60 + i] for i in range(10)]
    widths = [17] * 9 + [24]
    places = panels.place_badges(boxes, widths, (300, 200))
    assert places[0] == (10, 10)
    for i, ((x, y), width) in enumerate(zip(places, widths)):
        assert 0 <= x <= 300 - width and 0 <= y <= 200 - 16
        for (other_x, other_y), other in list(zip(places, widths))[:i]:
            assert x + width <= other_x or other_x + other <= x or abs(y - other_y) >= 16


def test_the_page_loads_nothing_and_trusts_no_text(record_set, tmp_path):
    lines = record_sets.write_annotations(tmp_path / "in", 8)
    evil = "<script>alert(1)</script> & \"quoted\" 'too'"
    lines[3]["regions"][0]["description"] = lines[3]["caption"] = lines[3]["id"] = evil
    (tmp_path / "in" / "A.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    inspect(tmp_path / "in" / "A.jsonl", tmp_path / "out", "--num-images=8")
    text = (tmp_path / "out" / "inspect.html").read_text()
    assert text.count("<script") == 1 and "alert(1)</script>" not in text
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', text)) == text.count(" src=") == 8
    sections = set(re.findall(r'<section id="([^"]+)"', text))
    assert sections and set(re.findall(r'href="#([^"]+)"', text)) == sections
    assert not re.search(r"(?:https?:)?//[a-z]", text.replace("http://www.w3.org/2000/svg", ""))
    assert "color-scheme: light dark" in text
    with PIL.Image.open(tmp_path / "out" / "contact_sheet.png") as picture:
        assert picture.width == 14 + 4 * 314 and picture.height > 2 * 225


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["{}/nothing"], "no such file or folder"),
        (["{}/in"], "got no dataset_info.json there, expected a TFDS set"),
        (["{}/in/empty.jsonl"], "the file is empty"),
        (["{}/in/A.jsonl", "--images={}/nothing"], "no such folder"),
        (["{}/out/tiny_set", "--images={}/in"], "which hold their images"),
        (["{}/in/A.jsonl", "--output={}/in/A.jsonl"], "A.jsonl"),
        (["set", "--num-images=201"], "--num-images: got '201', expected a whole number in 0..200"),
        (["set", "--lanes=0"], "--lanes"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(record_set, capsys, arguments, message):
    (record_set / "in" / "empty.jsonl").write_text("\n")
    assert command.main([argument.format(record_set) for argument in arguments]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and message in printed[0]


def test_nothing_but_faults_is_still_reported(tmp_path):
    (tmp_path / "A.jsonl").write_text('{"image": "gone.png", "caption": "a"}\n')
    result = inspect(tmp_path / "A.jsonl", tmp_path / "out")
    assert result["pictures"]["count"] == 0 and len(result["problems"]) == 1
    assert not (tmp_path / "out" / "contact_sheet.png").exists()
    assert "No images." in (tmp_path / "out" / "inspect.html").read_text()
