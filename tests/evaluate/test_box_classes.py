import json

import numpy as np
import pytest

from grain_jax.core import errors
from grain_jax.evaluate import box_classes, rates, tables
from tests.evaluate.stub import StubPredictor, annotate, measure, region

TEXTS = {"a cat": [1, 0, 0], "a Dog": [0, 1, 0], "a cow": [0, 0, 1]}
LEFT, RIGHT, CORNER = [0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.9, 0.9, 1, 1]


@pytest.fixture
def data(tmp_path):
    """Three images of 20 x 10 pixels and their boxes; the last image cannot be read."""
    regions = [
        [([0, 0, 10, 10], "cat"), ([10, 0, 20, 10], "Dog")],
        # Query 0 covers .4 of it, as much as no other; the second lies outside.
        [([0, 0, 10, 4], "cow"), ([30, 0, 40, 9], "cow")],
        [([0, 0, 9, 9], "cat")],
        [],
    ]
    options = annotate(tmp_path, [{"regions": [region(*x) for x in boxes]} for boxes in regions])
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "templates.txt").write_text("a {}")
    predictor = StubPredictor(
        # The image says cat, and of the second one cow before dog.
        images={0: [1, 0.5, 0], 1: [0, 0.1, 1]},
        texts=TEXTS,
        regions={
            0: ([LEFT, [0.4, 0, 1, 1], CORNER], [[1, 0, 0], [0, 0.6, 0.7], [0, 1, 0]]),
            1: ([LEFT, RIGHT, CORNER], [[0, 0, 1], [0, 1, 0], [1, 0, 0]]),
        },
    )
    return predictor, options | dict(templates=tmp_path / "templates.txt")


def test_hand_computed(data):
    predictor, options = data
    got = measure("boxes", predictor, **options)
    assert predictor.asked == list(TEXTS)
    assert (got["images"], got["unreadable"], got["without_regions"]) == (2, 1, 1)
    assert (got["boxes"], got["boxes_outside"], got["boxes_of_other_classes"]) == (3, 1, 0)
    assert (got["classes"], got["chance"], got["chance_top5"]) == (3, 1 / 3, 1.0)
    # cat by query 0 (IoU 1): right; dog by query 1 (IoU 5/6): it says cow; cow by query 0 (.4): right.
    assert got["best_iou"] == pytest.approx((1 + 5 / 6 + 0.4) / 3)
    assert got["found"] == pytest.approx(2 / 3)
    assert got["region"]["top1"] == pytest.approx(2 / 3)
    assert got["region"]["per_class"] == {"cat": 1.0, "Dog": 0.0, "cow": 1.0}
    assert got["region"]["mean_per_class"] == pytest.approx(2 / 3)
    low, high = rates.interval(2, 3)
    assert (got["region"]["top1_low"], got["region"]["top1_high"]) == (low, high)
    # Cat is right among the two found ones. The image embedding knows cat and cow, too.
    assert got["found_boxes"]["boxes"] == 2
    assert got["found_boxes"]["region"]["per_class"] == {"cat": 1.0, "Dog": 0.0}
    assert got["image"]["per_class"] == {"cat": 1.0, "Dog": 0.0, "cow": 1.0}
    assert got["found_boxes"]["image"]["top1"] == 0.5
    assert tables.scalars(got)["region/top5"] == 1.0
    json.dumps(got)


def test_class_file(data, tmp_path):
    predictor, options = data
    path = tmp_path / "classes.txt"
    path.write_text("cow\tcow\nfelis\tcat\n")
    got = measure("boxes", predictor, **options, classes=str(path))
    assert (got["boxes"], got["boxes_of_other_classes"]) == (2, 1)
    assert (got["classes"], got["classes_with_boxes"]) == (2, 2)
    assert got["region"]["per_class"] == {"cow": 1.0, "cat": 1.0}
    assert got["groups"] == {}
    path.write_text("small_cow\tcow\trare\nfelis\tcat\tfrequent\ncanis\tDog\tfrequent\n")
    got = measure("boxes", predictor, **options, classes=str(path))["groups"]
    assert {name: part["boxes"] for name, part in got.items()} == {"rare": 1, "frequent": 2}
    assert got["rare"]["region"]["per_class"] == {"cow": 1.0}
    assert got["frequent"]["region"]["per_class"] == {"cat": 1.0, "Dog": 0.0}  # it says cow
    path.write_text("goat\n")
    with pytest.raises(errors.UserError, match="got no box that is of one of 1 classes"):
        measure("boxes", predictor, **options, classes=str(path))


def test_best_query():
    boxes = np.array([LEFT, [0, 0.5, 0.1, 1]], np.float32)
    queries = np.array([[CORNER, RIGHT, LEFT], [CORNER, RIGHT, CORNER]], np.float32)
    measured = box_classes.best_query(queries, boxes)
    # Nothing overlaps the second box: the right half is nearer to it, as GIoU has it, than a corner.
    assert measured.query.tolist() == [2, 1] and measured.iou.tolist() == [1, 0]
