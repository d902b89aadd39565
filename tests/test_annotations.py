import json

import pytest

from grain_jax import annotations


def _write(tmp_path, *lines):
    path = tmp_path / "A.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def _region(**fields):
    return {"box": [1, 2, 3, 4], "description": "a beak", "score": 0.5} | fields


def test_reads(tmp_path):
    path = _write(
        tmp_path,
        {"image": "a.png", "caption": " one ", "captions": ["two", " "], "id": "x", "extra": 1},
        "",
        {
            "image": "./sub//b.png",
            "synthetic_caption": "s",
            "regions": [_region(), _region(score=None)],
        },
    )
    read = annotations.read(path)
    assert (read.faults, read.faulty_lines, read.unknown_keys) == ([], 0, {"extra": 1})
    first, second = read.records
    assert first == annotations.Annotation(1, "a.png", ("one", "two"), None, ())
    assert (second.line, second.image, second.synthetic_caption) == (3, "sub/b.png", "s")
    assert second.regions[0] == annotations.Region((1.0, 2.0, 3.0, 4.0), "a beak", 0.5)
    assert second.regions[1].score == 1.0


@pytest.mark.parametrize(
    "line, fault",
    [
        ("{", "not JSON"),
        ([1], "got [1], expected a JSON object"),
        ({}, "image: got nothing, expected a path"),
        ({"image": "../a.png"}, "image: got '../a.png', expected a path that stays below"),
        ({"image": "/a.png"}, "image: got '/a.png', expected a path that stays below"),
        ({"image": "a", "caption": 5}, "caption: got 5, expected text"),
        ({"image": "a", "captions": "x"}, "captions: got 'x', expected a list of texts"),
        ('{"image": "a", "caption": "\\ud800"}', "caption: got "),
        ({"image": "a", "synthetic_caption": []}, "synthetic_caption: got [], expected text"),
        ({"image": "a", "regions": {}}, "regions: got {}, expected a list"),
        ({"image": "a", "regions": [3]}, "regions[0]: got 3, expected an object"),
        ({"image": "a", "regions": [_region(box=[1, 2, 3])]}, "regions[0].box: got [1, 2, 3]"),
        ({"image": "a", "regions": [_region(box=[1, 2, 3, float("nan")])]}, "four finite numbers"),
        ({"image": "a", "regions": [_region(box=[3, 2, 1, 4])]}, "expected x1 < x2 and y1 < y2"),
        ({"image": "a", "regions": [_region(description=" ")]}, "regions[0].description: got ' '"),
        ({"image": "a", "regions": [_region(score="x")]}, "regions[0].score: got 'x'"),
    ],
)
def test_faults_name_their_line(tmp_path, line, fault):
    path = _write(tmp_path, {"image": "a.png"}, line)
    read = annotations.read(path, max_faults=0.5)
    assert len(read.records) == 1 == read.faulty_lines == len(read.faults)
    assert read.faults[0].startswith("A.jsonl:2: ") and fault in read.faults[0]
    with pytest.raises(annotations.AnnotationError, match="1 of 2 lines are faulty, more than 1%"):
        annotations.read(path)


def test_missing_and_empty(tmp_path):
    with pytest.raises(annotations.AnnotationError, match="no such file"):
        annotations.read(tmp_path / "no.jsonl")
    with pytest.raises(annotations.AnnotationError, match="the file is empty"):
        annotations.read(_write(tmp_path, ""))


def test_boxes_are_clipped():
    box = annotations.normalised_box_xyxy
    assert box((5, 2, 10, 8), 20, 10) == (0.25, 0.2, 0.5, 0.8)
    assert box((-5, 0, 15, 12), 20, 10) == (0.0, 0.0, 0.75, 1.0)  # 62.5% are left
    assert box((-10, 0, 10, 10), 20, 10) == (0.0, 0.0, 0.5, 1.0)  # just half
    assert box((-11, 0, 10, 10), 20, 10) is None
    assert box((30, 0, 40, 10), 20, 10) is None
