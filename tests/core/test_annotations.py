import json

import pytest

from grain_jax.core import annotations

pytestmark = pytest.mark.quick


def _write(tmp_path, *lines):
    path = tmp_path / "A.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else _line(x)) + b"\n" for x in lines))
    return path


def _line(item):
    return json.dumps(item).encode()


def _region(**fields):
    return {"box": [1, 2, 3, 4], "description": "a beak", "score": 0.5} | fields


def test_reads(tmp_path):
    path = _write(
        tmp_path,
        {"image": "a.png", "caption": " one ", "captions": ["two", " "], "id": "x", "extra": 1},
        b"",
        {
            "image": "./sub//b.png",
            "synthetic_caption": "s",
            "regions": [_region(mask=0), _region(score=1, mask=0)],
            "phrases": [[0, 1], [1], [1]],
        },
    )
    read = annotations.read(path)
    assert (read.faults, read.faulty_lines) == ([], 0)
    assert read.unknown_keys == {"extra": 1, "regions.mask": 2}
    first, second = read.records
    assert first == annotations.Annotation("a.png", ("one", "two"), "", (), "x")
    assert second.image == "sub/b.png" and second.synthetic_caption == "s" and second.id is None
    assert second.phrases == ((0, 1), (1,), (1,))
    box_xyxy = (1.0, 2.0, 3.0, 4.0)
    assert second.regions == ((box_xyxy, "a beak", 0.5, ()), (box_xyxy, "a beak", 1.0, ()))


@pytest.mark.parametrize(
    "line, fault",
    [
        (b'{"image": "a', "not JSON: Unterminated string starting at column 11, expected"),
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2, expected"),
        (b'{"image": "\xff.png"}', "not JSON: not UTF-8 text (byte 11), expected one JSON object"),
        (b"[" * 100_000, "not JSON: too deeply nested"),
        ({}, "image: got none, expected the path of an image"),
        ({"image": "\0"}, 'image: got "\\u0000", expected the path of an image'),
        ({"image": "../a.png"}, 'image: got "../a.png", expected a path that stays below'),
        ({"image": "/a.png"}, 'image: got "/a.png", expected a path that stays below'),
        ({"image": "a", "caption": 5}, "caption: got 5, expected a text"),
        ({"image": "a", "caption": "\ud800"}, 'caption: got "\\ud800", expected a text'),
        ({"image": "a", "id": ""}, 'id: got "", expected a text'),
        ({"image": "a", "regions": [3]}, "regions[0]: got 3, expected an object with box, desc"),
        ({"image": "a", "regions": [_region(box=[1, 2, 3])]}, "regions[0].box: got [1, 2, 3]"),
        ({"image": "a", "regions": [_region(box=[1, 2, 3, float("nan")])]}, "four finite numbers"),
        ({"image": "a", "regions": [_region(box=[1, 2, 3, 10**400])]}, "four finite numbers"),
        ({"image": "a", "regions": [_region(box=[3, 2, 1, 4])]}, "inverted, expected x1 < x2"),
        ({"image": "a", "regions": [_region(box=[3, 2, 3, 4])]}, "no area, expected x1 < x2"),
        ({"image": "a", "regions": [_region(description=" ")]}, 'regions[0].description: got " "'),
        ({"image": "a", "regions": [_region(score=1.5)]}, "got 1.5, expected a number from 0 to 1"),
        ({"image": "a", "regions": [{"box": [1, 2, 3, 4], "description": "a"}]}, "score: got none"),
        (
            {"image": "a", "regions": [_region(negatives=["b", "A  Beak"])]},
            'regions[0].negatives[1]: got "A  Beak", expected another text than the description',
        ),
        (
            {"image": "a", "regions": [_region(negatives=["b", "c", "B"])]},
            'regions[0].negatives[2]: got "B", expected another text than an earlier one',
        ),
        ({"image": "a", "regions": [_region()], "phrases": [[0], [1]]}, "phrases[1]: got [1], exp"),
        (
            {"image": "a", "regions": [_region(), _region(description="b")], "phrases": [[0, 1]]},
            "phrases[0]: got [0, 1], expected positions of regions with one description",
        ),
    ],
)
def test_faults_name_their_line(tmp_path, line, fault):
    path = _write(tmp_path, *[{"image": "a.png"}] * 99, line)
    read = annotations.read(path)
    assert len(read.records) == 99 and read.faulty_lines == 1 == len(read.faults)
    assert read.faults[0].startswith(f"{path}:100: ") and fault in read.faults[0]
    path = _write(tmp_path, {"image": "a.png"}, line)
    with pytest.raises(annotations.AnnotationError, match="1 of 2 lines are faulty, more than 1%"):
        annotations.read(path)


def test_all_faults_are_reported(tmp_path):
    lines = [{"image": "a", "id": 3, "regions": [_region(score=2)]}] * 50
    path = _write(tmp_path, *lines)
    with pytest.raises(annotations.AnnotationError) as caught:
        annotations.read(path)
    *faults, summary = str(caught.value).splitlines()
    assert faults[-2:] == [
        f"{path}:50: id: got 3, expected a text",
        f"{path}:50: regions[0].score: got 2, expected a number from 0 to 1",
    ]
    assert len(faults) == 100
    assert summary == f"{path}: 50 of 50 lines are faulty, more than 1%"


@pytest.mark.parametrize(
    "item, faults",
    [
        ({"caption": "a"}, []),
        ({"captions": ["a"]}, []),
        ({"synthetic_caption": "a"}, []),
        ({"caption": " ", "captions": []}, ["no caption"]),
        ({"caption": 3}, ["caption"]),  # one fault, not two
    ],
)
def test_a_caption_may_be_required(item, faults):
    line = _line({"image": "caption.png"} | item)
    parsed = annotations.parse_line(line, text_required=True)
    assert [fault.split(":")[0] for fault in parsed.faults] == faults
    assert (parsed.annotation is None) == bool(faults)
    without = annotations.parse_line(line, text_required=False).faults
    assert without == [fault for fault in parsed.faults if not fault.startswith("no caption")]


def test_a_faulty_line_tells_what_else_to_check():
    regions = [_region(box=[1]), _region(score=2), 5, _region()]
    parsed = annotations.parse_line(_line({"image": "a.png", "regions": regions}), text_required=False)
    assert parsed.annotation is None and parsed.image == "a.png"
    assert parsed.boxes_xyxy == [None, (1, 2, 3, 4), None, (1, 2, 3, 4)]


def test_boxes_are_clipped():
    clip = annotations.clip_box
    assert clip((5.0, 2.0, 10.0, 8.0), 20, 10) == ((5, 2, 10, 8), 1)
    assert clip((-5.0, 0.0, 15.0, 10.0), 20, 10) == ((0, 0, 15, 10), 0.75)
    assert clip((-10.0, 0.0, 10.0, 10.0), 20, 10) == ((0, 0, 10, 10), 0.5)  # just half
    assert clip((16.0, 0.0, 26.0, 10.0), 20, 10) == (None, 0.4)
    assert clip((30.0, 0.0, 40.0, 10.0), 20, 10) == (None, 0)
    assert clip((-1e300, -1e300, 1e300, 1e300), 20, 10) == (None, 0)  # its area is no float
