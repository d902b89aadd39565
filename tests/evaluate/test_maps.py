import json

import numpy as np
import pytest

from grain_jax.evaluate import maps, tables
from tests.evaluate.stub import StubPredictor, annotate, measure, number, region

TEXTS = {"a cat": [1, 0], "a dog": [0, 1]}


class Mapped(StubPredictor):
    """A stub whose map of an image and a text is in a table."""

    def similarity_maps(self, images, text_embeds):
        tables_ = [self.images[number(image)] for image in images]
        return [
            np.array([table[int(np.argmax(text))] for text in texts], np.float32).reshape(-1, 2, 2)
            for table, texts in zip(tables_, text_embeds, strict=True)
        ]


@pytest.fixture
def data(tmp_path):
    """Two images of 20 x 10 pixels: the cat in the left half of both, the dog below on the right of the first."""
    left, corner = region([0, 0, 10, 10], "a cat"), region([10, 5, 20, 10], "a dog")
    lines = [
        {"regions": [left, corner, region([30, 0, 40, 9], "a dog")]},
        {"regions": [left]},
        {"image": "none.png", "regions": [left]},
        {"image": "1.png", "regions": []},
    ]
    options = annotate(tmp_path, lines)
    predictor = Mapped(
        texts=TEXTS,
        images={
            0: {0: [[1, 0], [1, 0]], 1: [[0, 1], [0, 0]]},  # the cat is right, the dog above
            1: {0: [[0, 1], [1, 0]]},  # one of two equally high cells is right
        },
    )
    return predictor, options


def test_hand_computed(data):
    predictor, options = data
    got = measure("maps", predictor, **options)
    assert (got["pictures"], got["unreadable"], got["without_regions"]) == (2, 1, 1)
    assert (got["phrases"], got["regions_outside"]) == (3, 1)
    assert got["pointing"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert got["chance_pointing"] == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    assert got["chance_map_iou"] == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    assert tables.rows_of(got["kind"], tables.scalars(got))[0].key == "pointing"
    json.dumps(got)


def test_the_iou_is_that_of_the_best_threshold():
    # A map that rises from left to right: above 1/2 it is the right half, which is the box.
    single, box = np.array([[0, 1.0]]), np.array([[0.5, 0, 1, 1]])
    measured = maps._measured([(single, box), (single, box)])
    mean = measured["iou"].mean(0)
    assert mean[list(maps.thresholds().round(2)).index(0.5)] == 1 == mean.max()
    assert mean[0] == pytest.approx(0.5 / 0.725, abs=0.01)  # above .05 from x = .275 on
    assert measured["hit"].tolist() == [1, 1] and measured["chance"].tolist() == [0.5, 0.5]


def test_a_map_without_differences_says_nothing():
    measured = maps._measured([(np.ones((4, 4)), np.array([[0, 0, 0.25, 0.5]]))])
    assert measured["hit"].tolist() == measured["chance"].tolist() == [2 / 16]
