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
    # The image embedding knows cat and cow, too.
    assert got["image"]["per_class"] == {"cat": 1.0, "Dog": 0.0, "cow": 1.0}
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
    query, iou = box_classes.best_query(queries, boxes)
    # Nothing overlaps the second box: the right half is nearer to it, as GIoU has it, than a corner.
    assert query.tolist() == [2, 1] and iou.tolist() == [1, 0]


WORDS = {"red": [1, 0, 0], "blue": [0, 1, 0], "green": [0, 0, 1], "pale": [0.6, 0.8, 0]}


def test_hard_negatives(tmp_path):
    """Three images of 20 x 10 pixels; regions with two negatives, with one, and outside."""
    left, right, outside = [0, 0, 10, 10], [10, 0, 20, 10], [30, 0, 40, 9]
    regions = [
        [(left, "red", "blue", "green"), (right, "blue", "red", "pale")],
        [(left, "green", "red"), (outside, "red", "blue", "green")],
        [(right, "red", "blue", "green")],
    ]
    made = [[region(box, text, negatives=rest) for box, text, *rest in boxes] for boxes in regions]
    options = annotate(tmp_path, [{"regions": boxes} for boxes in made])
    embeds = [[1, 0, 0], [0.5, 0.8, 0]], [[0, 0, 1], [0, 1, 0]], [[1, 0, 0], [0, 1, 0]]
    # Of the regions red is right, pale is nearer than blue; the last one is wrong. The image says red, of the
    # last one red and blue alike.
    images = {0: [1, 0, 0], 1: [1, 0, 0], 2: [1, 1, 0]}
    predictor = StubPredictor(images, WORDS, {i: ([LEFT, RIGHT], x) for i, x in enumerate(embeds)})
    got = measure("hard_negatives", predictor, **options, negatives=2)
    assert (got["boxes"], got["boxes_with_fewer_negatives"], got["boxes_outside"]) == (3, 1, 1)
    assert (got["chance"], got["chance_mean_rank"], got["images"]) == (1 / 3, 2.0, 3)
    assert got["region"]["top1"] == pytest.approx(1 / 3)
    # The last box: red and green are at 0, and a tie counts as lost.
    assert got["region"]["mean_rank"] == pytest.approx((1 + 2 + 3) / 3)
    assert got["region"]["median_rank"] == 2
    assert got["image"]["top1"] == pytest.approx((1 + 0 + 0.5) / 3)  # of two alike, one at random
    assert "box_head" not in got
    rows = tables.rows_of(got["kind"], tables.scalars(got))
    assert [row.key for row in rows[:2]] == ["region/top1", "region/mean_rank"]
    json.dumps(got)
    got = measure("hard_negatives", predictor, **options, negatives=1)
    assert (got["boxes"], got["negatives"]) == (4, 1)
    assert got["region"]["top1"] == pytest.approx(3 / 4)  # of blue, pale is not asked for
