import json

import pytest

from grain_jax.evaluate import tables
from tests.evaluate.stub import StubPredictor, annotate, measure, region

TEXTS = {"red": [1, 0, 0], "blue": [0, 1, 0], "green": [0, 0, 1], "pale": [0.6, 0.8, 0]}
LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 1, 1]


@pytest.fixture
def data(tmp_path):
    """Two images of 20 x 10 pixels; regions with two negatives, with one, and outside."""
    regions = [
        [([0, 0, 10, 10], "red", "blue", "green"), ([10, 0, 20, 10], "blue", "red", "pale")],
        [([0, 0, 10, 10], "green", "red"), ([30, 0, 40, 9], "red", "blue", "green")],
        [([10, 0, 20, 10], "red", "blue", "green")],
    ]
    made = [[region(box, text, negatives=rest) for box, text, *rest in boxes] for boxes in regions]
    options = annotate(tmp_path, [{"regions": boxes} for boxes in made])
    predictor = StubPredictor(
        # The image says red, of the last one red and blue alike.
        images={0: [1, 0, 0], 1: [1, 0, 0], 2: [1, 1, 0]},
        texts=TEXTS,
        regions={
            0: ([LEFT, RIGHT], [[1, 0, 0], [0.5, 0.8, 0]]),  # right; pale is nearer
            1: ([LEFT, RIGHT], [[0, 0, 1], [0, 1, 0]]),
            2: ([LEFT, RIGHT], [[1, 0, 0], [0, 1, 0]]),  # wrong
        },
    )
    return predictor, options


def test_hand_computed(data):
    predictor, options = data
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


def test_fewer_negatives_take_the_first(data):
    predictor, options = data
    got = measure("hard_negatives", predictor, **options, negatives=1)
    assert (got["boxes"], got["negatives"]) == (4, 1)
    assert got["region"]["top1"] == pytest.approx(3 / 4)  # of blue, pale is not asked for
