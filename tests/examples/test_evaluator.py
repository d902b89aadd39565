"""examples/evaluator: a user's k-nearest-neighbour evaluator, counted by hand, in training and in a suite."""

import json
import types

import numpy as np
import pytest

from examples.evaluator import neighbours
from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.evaluate import __main__ as command
from grain_jax.evaluate import kinds, suite, tables
from grain_jax.train import journal, schedule
from tests import tiny
from tests.evaluate.stub import StubPredictor, write_picture

KIND = "examples.evaluator.neighbours:Neighbours"
# Number of an image -> its class and the angle of its embedding in degrees.
TRAIN = {0: ("cat", 0), 1: ("cat", 10), 2: ("cat", 100), 3: ("dog", 90), 4: ("dog", 80)}
TEST = {5: ("cat", 2), 6: ("cat", 97), 7: ("dog", 60), 8: ("dog", 30)}
SUITE = """
from ml_collections import ConfigDict
from grain_jax.evaluate import kinds

def get_config():
    c = ConfigDict()
    c.evals = dict(mine=kinds.evaluator(%r, %r, train=%r))
    return c
"""


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


# The nearest training images by angle: 5 (2 degrees): 0, 1, 4. 6 (97): 2, 3, 4. 7 (60): 4, 3, 2. 8 (30): 1, 0, 4.
@pytest.mark.parametrize(
    "k, cats, dogs", [(1, [1, 1], [1, 0]), (2, [1, 0.5], [1, 0]), (3, [1, 0], [1, 0])]
)
def test_accuracy_is_the_one_counted_by_hand(folder, predictor, k, cats, dogs):
    numbers = tables.scalars(kinds.from_entry(entry(folder, k=k)).evaluate(predictor))
    assert numbers["top1"] == pytest.approx(np.mean(cats + dogs))
    assert numbers["mean_per_class"] == pytest.approx((np.mean(cats) + np.mean(dogs)) / 2)
    assert (numbers["pictures"], numbers["train_pictures"], numbers["chance"]) == (4, 5, 0.5)
    assert numbers["top1_low"] < numbers["top1"] < numbers["top1_high"]


def test_a_suite_has_it_beside_the_evaluators_of_the_package(
    folder, predictor, monkeypatch, capsys
):
    (folder / "suite.py").write_text(SUITE % (KIND, f"{folder}/test", f"{folder}/train"))
    monkeypatch.setattr(inference, "load", lambda path, **_: predictor)
    monkeypatch.setattr("grain_jax.checkpoint.saved_model.find", lambda path: path)
    arguments = ["suite", "--checkpoint", "RUN", "--output", str(folder / "o.json")]
    arguments += ["--config", str(folder / "suite.py"), "--config.evals.mine.k=1"]
    assert command.main(arguments) == 0
    result = json.loads((folder / "o.json").read_text())["ran"]["mine"]
    assert result["kind"] == result["entry"]["kind"] == KIND and result["entry"]["k"] == 1
    assert result["top1"] == 0.75 and result["per_class"] == {"cat": 1.0, "dog": 0.5}
    out, err = capsys.readouterr()
    assert "mine (1 of 1): 9 images in" in err and "mine: top1" in out


def test_a_run_measures_it_and_keeps_it_in_its_config(
    folder, predictor, tmp_path, monkeypatch, capsys
):
    c = tiny.dictionary(checkpoint_best_metric="eval/mine/top1")
    c.evals = dict(mine=entry(folder, k=1), gone=entry(folder / "gone", missing="skip", get="ask"))
    config = config_lib.from_dict(c)
    evaluators = kinds.from_entries(config.evals)
    assert evaluators["mine"] == neighbours.Neighbours(**entry(folder, k=1))
    assert config_lib.from_dict(json.loads(config_lib.to_json(config))) == config
    evals = suite.present(evaluators)
    schedule.check_best_entry(config, evals)
    gone = f"{folder}/gone/test, {folder}/gone/train: not there; to get it: ask"
    assert f"evals.gone: skipped: {gone}" in capsys.readouterr().err
    monkeypatch.setattr(journal, "make_predictor", lambda *_: predictor)
    state = types.SimpleNamespace(step=np.int32(7))
    results = journal.evaluate_all(config, evals, state)
    assert results["eval/mine/top1"] == 0.75 and results["eval/mine/pictures"] == 4
