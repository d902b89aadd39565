"""RefCOCO and Flickr30k Entities from their public files to their protocols' numbers, by the public commands."""

import json
import pickle

import pytest

from grain_jax import inference
from grain_jax.data.annotate import __main__ as annotate
from grain_jax.evaluate import __main__ as evaluate
from tests.evaluate.stub import StubPredictor, write_picture

LEFT, RIGHT, WHOLE = [0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 1, 1]


def grounding(folder, source, files, regions, monkeypatch, texts):
    """The result of both commands on images of 40 x 20 pixels; `regions` as StubPredictor's."""
    arguments = [f"--source={source}", "--annotations", *map(str, files), "--passes=none"]
    arguments += [f"--images={folder / 'images'}", f"--output={folder / 'out'}"]
    assert annotate.main(arguments) == 0
    predictor = StubPredictor(dict.fromkeys(regions, [1, 0, 0]), texts, regions)
    monkeypatch.setattr(inference, "load", lambda path, **_: predictor)
    monkeypatch.setattr("grain_jax.checkpoint.saved_model.find", lambda path: path)
    arguments = ["grounding", "--checkpoint=RUN", f"--images={folder / 'images'}"]
    arguments += [f"--annotations={folder / 'out/A.jsonl'}", f"--output={folder / 'g.json'}"]
    assert evaluate.main(arguments) == 0
    return json.loads((folder / "g.json").read_text())


def test_each_expression_of_refcoco_counts_with_its_own_box(tmp_path, monkeypatch):
    write_picture(tmp_path / "images/0.png", 0, (40, 20))
    boxes = {1: [0, 0, 20, 20], 2: [20, 0, 20, 20]}  # COCO's x, y, width, height
    said = {1: ["man on left", "man on left", "guy"], 2: ["guy"]}
    refs = [{"ref_id": n, "ann_id": n, "image_id": 0, "split": "testA"} for n in boxes]
    for ref in refs:
        ref["sentences"] = [{"sent": text} for text in said[ref["ann_id"]]]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    images = [{"id": 0, "file_name": "0.png", "width": 40, "height": 20}]
    objects = [{"id": n, "image_id": 0, "bbox": box} for n, box in boxes.items()]
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": objects}))
    files = [tmp_path / "refs(unc).p", tmp_path / "instances.json"]
    # The right half says guy, as one of the two guys is; the lower part says man on left (IoU 4 / 14 with him).
    answers = {0: ([RIGHT, [0, 0.6, 1, 1]], [[1, 0, 0], [0, 1, 0]])}
    texts = {"guy": [1, 0, 0], "man on left": [0, 1, 0]}
    result = grounding(tmp_path, "refcoco", files, answers, monkeypatch, texts)
    assert (result["regions"], result["phrases"]) == (3, 4)
    assert result["phrase_acc50"] == 0.25
    assert result["phrase_iou"] == pytest.approx((0 + 1 + 2 * 4 / 14) / 4)
    assert not any("merged" in key for key in result)  # no expression has several boxes
    line = json.loads((tmp_path / "out/A.jsonl").read_text())
    assert [region["description"] for region in line["regions"]] == ["man on left", "guy", "guy"]
    assert line["phrases"] == [[0], [0], [2], [1]]


@pytest.mark.parametrize(
    "dogs, any_box, merged", [(WHOLE, 2 / 4, 3 / 4), ([0, 0, 0.25, 1], 3 / 4, 2 / 4)]
)
def test_the_protocols_of_flickr30k_entities(tmp_path, monkeypatch, dogs, any_box, merged):
    write_picture(tmp_path / "images/0.png", 0, (40, 20))
    (tmp_path / "images/0.png").rename(tmp_path / "images/0.jpg")  # PIL looks at the content
    for name in ("Sentences", "Annotations"):
        (tmp_path / name).mkdir()
    (tmp_path / "Sentences/0.txt").write_text(
        "[/EN#1/people A man] beside [/EN#2/people a man] and [/EN#3/animals two dogs] .\n"
        "[/EN#1/people A man] in [/EN#4/scene a park] .\n"
    )
    corners = {"1": [0, 20], "2": [20, 40], "3": [0, 10], "3 ": [30, 40]}  # chain -> x1, x2
    objects = "".join(
        f"<object><name>{chain.strip()}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>1</ymin>"
        f"<xmax>{x2}</xmax><ymax>20</ymax></bndbox></object>"
        for chain, (x1, x2) in corners.items()
    )
    objects += "<object><name>4</name><scene>1</scene><nobndbox>1</nobndbox></object>"
    size = "<size><width>40</width><height>20</height><depth>3</depth></size>"
    (tmp_path / "Annotations/0.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    # The left half says man, right for chain 1, which two sentences name, and wrong for chain 2.
    answers = {0: ([LEFT, dogs], [[1, 0, 0], [0, 1, 0]])}
    texts = {"A man": [1, 0, 0], "two dogs": [0, 1, 0]}
    result = grounding(tmp_path, "flickr30k_entities", [tmp_path], answers, monkeypatch, texts)
    assert (result["regions"], result["phrases"], result["phrases_of_several_boxes"]) == (4, 4, 1)
    assert result["phrase_acc50"] == any_box == result["phrase_acc50_any_box"]
    assert result["phrase_acc50_any_box_low"] == result["phrase_acc50_low"]
    assert result["phrase_acc50_merged_box"] == merged
    # A query at random: both are right for the man on the left; of the others only the halves that overlap by 0.5.
    assert result["chance_phrase_acc50_merged_box"] == (7 / 8 if dogs == WHOLE else 5 / 8)
