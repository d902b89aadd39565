"""`grain-jax inspect --checkpoint`: the ranking of regions by a model that names colours."""

import csv
import json
import types

import numpy as np
import PIL.Image
import pytest

from grain_jax import inference
from grain_jax.core import schema
from grain_jax.data.inspect import __main__ as command
from grain_jax.data.inspect import audit

BOXES = {"red": [0, 0, 12, 8], "green": [12, 0, 24, 8], "blue": [0, 8, 12, 16]}  # of 24 x 16 pixels


class Colours:
    """A box is embedded as the mean of its pixels; every image has a proposal for each of BOXES."""

    model = types.SimpleNamespace(image=types.SimpleNamespace(image_size=48))
    has_box_head = has_proposals = True
    encode_tokens = staticmethod(lambda pixels: pixels)
    encode_text = staticmethod(lambda texts: np.eye(3, dtype=np.float32)[[[*BOXES].index(x) for x in texts]])

    def encode_boxes(self, pixels, boxes_xyxy):
        corners = [np.rint(x * 48).astype(int) for x in boxes_xyxy]
        of = lambda image, box: image[box[1] : box[3], box[0] : box[2]].mean(axis=(0, 1))
        means = [np.array([of(image, box) for box in each]) for image, each in zip(pixels, corners)]
        return [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6) for x in means]

    def encode_regions(self, pixels):
        boxes = np.stack([np.array([*BOXES.values()]) / (24, 16, 24, 16)] * len(pixels))
        return schema.Regions(
            boxes, np.array(self.encode_boxes(pixels, boxes)), np.full((len(pixels), 3), -0.125)
        )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """In line 2 "Red" has the box of another region; line 3 has a wrong text, line 4 a moved box."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    for channel, (x1, y1, x2, y2) in enumerate(BOXES.values()):
        pixels[y1:y2, x1:x2, channel] = 255
    PIL.Image.fromarray(pixels).save(tmp_path / "all.png")
    pixels[:, 12:] = 0
    PIL.Image.fromarray(pixels).save(tmp_path / "no_green.png")
    region = lambda text, box: {"description": text, "box": box, "score": 1}
    right = [region(text, box) for text, box in BOXES.items()]
    every = [right, [region("Red", BOXES["green"]), *right[1:]], [region("green", BOXES["red"])]]
    every.append([right[1], region("blue", [0, 4, 12, 16])])
    lines = [{"image": "no_green.png" if i == 2 else "all.png", "regions": x} for i, x in enumerate(every)]
    (tmp_path / "A.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    monkeypatch.setattr(inference, "load", lambda _: Colours())
    return tmp_path


@pytest.mark.parametrize("proposals", [True, False])
def test_wrong_regions_come_first(folder, monkeypatch, proposals):
    monkeypatch.setattr(Colours, "has_proposals", proposals)
    assert command.main([f"{folder}/A.jsonl", f"--output={folder}/out", "--checkpoint=any"]) == 0
    with open(folder / "out/audit.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [row["where"] for row in rows[:3]] == ["A.jsonl:2", "A.jsonl:3", "A.jsonl:4"]
    swapped, wrong, moved = rows[:3]
    number = lambda row, *names: pytest.approx([float(row[name]) for name in names], abs=0.03)
    assert [swapped[x] for x in ("description", "called")] == ["Red", "green"]
    assert swapped["box"] == "[12.0, 0.0, 24.0, 8.0]"
    best = 0.875 if proposals else 1  # a proposal's prior counts; windows have none
    cosines = ("cosine", "called_cosine", "seen_cosine", "disagreement")
    assert number(swapped, *cosines) == [0, 1, best, 1 + best]
    assert number(wrong, "cosine", "disagreement") == [0, 1 - 0.125 * proposals] and wrong["called"] == "red"
    assert number(moved, "cosine") == [2 / 5**0.5] and moved["called"] == "blue"
    if proposals:  # windows may be parts of a box
        assert [swapped["seen_box"], moved["seen_box"]] == ["[0.0, 0.0, 12.0, 8.0]", "[0.0, 8.0, 12.0, 16.0]"]
        assert number(moved, "seen_iou") == [2 / 3]
        assert number(rows[3], "disagreement") == [-1]  # right: the other annotated boxes have 0
    page = (folder / "out/inspect.html").read_text()
    assert page.count("the model says: ") == 9 and "The model disagrees: 9 of 9 regions" in page


def test_a_box_with_the_same_text_is_not_elsewhere():
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.5, 0, 0.9, 1]], np.float32)
    cosines = np.array([[0.5, 0.9, 0.8], [0.1, 0.2, 0.3]])
    same, other = (audit.compared(boxes, cosines, np.array(text)) for text in ([0, 0], [0, 1]))
    assert [same[0].tolist(), other[0].tolist()] == [[0.5, 0.1], [0.9, 0.1]]
    assert same[1].tolist() == [1, 2]
    np.testing.assert_allclose(same[2], [0, 0.8], atol=1e-6)


def test_faults_are_one_line(folder, monkeypatch, capsys):
    command_line = [f"{folder}/A.jsonl", "--checkpoint=any"]
    (folder / "A.jsonl").write_text('{"image": "all.png", "caption": "x"}\n')
    assert command.main(command_line) == 2
    assert "got no regions, expected some for --checkpoint to rank" in capsys.readouterr().err
    monkeypatch.setattr(Colours, "has_box_head", False)
    assert command.main(command_line) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--checkpoint any: the model has no box head (model.boxes.kind is none), expected one" in line
