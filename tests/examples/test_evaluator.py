"""examples/evaluator: a user's k-nearest-neighbour evaluator, counted by hand, in training and in a suite."""

import numpy as np
import pytest

from examples.evaluator import neighbours
from grain_jax.evaluate import tables
from tests.evaluate.stub import StubPredictor, write_picture

KIND = "examples.evaluator.neighbours:Neighbours"
# Number of an image -> its class and the angle of its embedding in degrees.
TRAIN = {0: ("cat", 0), 1: ("cat", 10), 2: ("cat", 100), 3: ("dog", 90), 4: ("dog", 80)}
TEST = {5: ("cat", 2), 6: ("cat", 97), 7: ("dog", 60), 8: ("dog", 30)}


def entry(folder, **options):
    return dict(kind=KIND, images=f"{folder}/test", train=f"{folder}/train", **options)


@pytest.fixture
def folder(tmp_path):
    for part, images in (("train", TRAIN), ("test", TEST)):
        for number, (name, _) in images.items():
            write_picture(tmp_path / part / name / f"{number}.png", number)
    return tmp_path


@pytest.fixture
def predictor():
    angle = {number: np.deg2rad(degrees) for number, (_, degrees) in (TRAIN | TEST).items()}
    return StubPredictor({number: [np.cos(a), np.sin(a)] for number, a in angle.items()})


# The nearest by angle: 5 (2 degrees): 0, 1, 4. 6 (97): 2, 3, 4. 7 (60): 4, 3, 2. 8 (30): 1, 0, 4.
@pytest.mark.parametrize("k, cats, dogs", [(1, [1, 1], [1, 0]), (2, [1, 0.5], [1, 0]), (3, [1, 0], [1, 0])])
def test_accuracy_is_the_one_counted_by_hand(folder, predictor, k, cats, dogs):
    numbers = tables.scalars(neighbours.Neighbours(**entry(folder, k=k)).evaluate(predictor))
    assert numbers["top1"] == pytest.approx(np.mean(cats + dogs))
    assert numbers["mean_per_class"] == pytest.approx((np.mean(cats) + np.mean(dogs)) / 2)
    assert (numbers["images"], numbers["train_images"], numbers["chance"]) == (4, 5, 0.5)
    assert numbers["top1_low"] < numbers["top1"] < numbers["top1_high"]
