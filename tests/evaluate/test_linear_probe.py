"""The linear probe: against scikit-learn, on toys whose answer is known, by the command, in training."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from grain_jax import inference
from grain_jax.evaluate import __main__ as command
from grain_jax.evaluate import kinds, linear_probe, rates
from grain_jax.evaluate.kinds import evaluator
from tests.evaluate import tfds_sets
from tests.evaluate.stub import StubPredictor, measure, write_picture

linear_model = pytest.importorskip("sklearn.linear_model")
CLASSES = ("bee", "cow", "doe")


def _folders(folder, counts, first=0):
    """Class folders of images that the stub knows by their numbers, from `first` on; the labels."""
    labels = np.repeat(np.arange(len(counts)), counts)
    for number, label in enumerate(labels, first):
        write_picture(folder / CLASSES[label] / f"{number:02d}.png", number)
    return labels


def _embeddings(labels, noise, seed):
    """Unit embeddings around one direction per class, [N, 8]."""
    rng = np.random.default_rng(seed)
    embed = np.eye(3, 8)[labels] + noise * rng.normal(size=(len(labels), 8))
    return (embed / np.linalg.norm(embed, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def noisy(tmp_path):
    """A training and a test folder and their embeddings, of which a probe gets some wrong."""
    train = _folders(tmp_path / "train", (12, 9, 10))
    test = _folders(tmp_path / "test", (8, 5, 9), first=len(train))
    x_train, x_test = _embeddings(train, 0.7, 0), _embeddings(test, 0.7, 1)
    predictor = StubPredictor(dict(enumerate(np.concatenate([x_train, x_test]))))
    return tmp_path, predictor, (x_train, train), (x_test, test)


def _evaluate(folder, predictor, train="train", **options):
    given = dict(images=folder / "test", train=folder / train if train else None)
    return measure("linear_probe", predictor, **given, **options)


def test_is_scikit_learns_on_the_same_features(noisy):
    folder, predictor, (x_train, y_train), (x_test, y_test) = noisy
    found = _evaluate(folder, predictor, batch_size=5)
    assert (found["images"], found["train_images"], found["classes"]) == (22, 31, 3)
    assert (found["chance"], found["chance_top5"]) == (1 / 3, 1.0)
    # The C by hand: all that the search could have tried, at an eighth of a decade.
    held = linear_probe.hold_out(y_train, linear_probe.VALIDATION_SHARE)
    assert np.bincount(y_train[held]).tolist() == [2, 2, 2]
    fit = lambda x, y, c: linear_model.LogisticRegression(C=c, max_iter=1000).fit(x, y)
    x_train, x_test = x_train.astype(np.float64), x_test.astype(np.float64)
    validated = lambda c: fit(x_train[~held], y_train[~held], c).score(x_train[held], y_train[held])
    assert found["validation_top1"] == validated(found["C"])
    assert found["validation_top1"] >= max(validated(10.0**e) for e in range(-6, 7, 2))
    model = fit(x_train, y_train, found["C"])
    predicted = model.predict(x_test)
    assert found["top1"] == model.score(x_test, y_test) and 0.4 < found["top1"] < 1
    shares = [(predicted[y_test == c] == c).mean() for c in range(3)]
    assert found["per_class"] == pytest.approx(dict(zip(CLASSES, shares)))
    assert found["mean_per_class"] == pytest.approx(np.mean(shares))
    low, high = rates.interval(found["top1"] * 22, 22)
    assert (found["top1_low"], found["top1_high"]) == pytest.approx((low, high))
    assert found["top5"] == 1.0 and found["converged"]


def test_separable_classes_are_told_apart_and_equal_ones_are_at_chance(tmp_path):
    train = _folders(tmp_path / "train", (3, 4, 5))
    test = _folders(tmp_path / "test", (2, 2, 2), first=len(train))
    every = np.concatenate([train, test])
    told = StubPredictor(dict(enumerate(np.eye(3)[every])))
    result = _evaluate(tmp_path, told)
    assert result["top1"] == 1.0 == result["mean_per_class"]
    alike = StubPredictor(dict.fromkeys(range(len(every)), [1, 0, 0]))
    # If all embeddings are equal, the answer is the most frequent class of the training set.
    assert _evaluate(tmp_path, alike)["per_class"] == {"bee": 0, "cow": 0, "doe": 1}


def test_ties_go_to_the_strongest_penalty():
    """Embeddings of zeros: every C gives the same regression."""
    data = linear_probe.Data(np.zeros((9, 4)), np.arange(9) % 3)
    model, _ = linear_probe.fit(data, data, data)
    assert model.C == 10.0 ** linear_probe.EXPONENTS[0]


def test_two_classes_and_a_split_of_one_folder(tmp_path):
    labels = _folders(tmp_path / "test", (10, 10))
    predictor = StubPredictor(dict(enumerate(np.eye(2)[labels])))
    result = _evaluate(tmp_path, predictor, train=None)
    assert (result["train_images"], result["images"]) == (14, 6)
    assert result["images_per_class"] == {"bee": 3, "cow": 3}
    assert result["top1"] == 1.0
    (tmp_path / "test/bee/00.png").write_bytes(b"no picture")
    result = _evaluate(tmp_path, predictor, train=None)
    assert result["unreadable"] == 1 and result["train_images"] + result["images"] == 19


def test_a_tfds_set_is_probed_by_its_splits(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    labels = np.array([0, 1, 0, 1, 0, 1, 1, 0])
    pictures = tfds_sets.numbered(range(8))
    tfds_sets.write(tmp_path, "dtd", "3.0.1", "test", pictures, labels, names=["a", "b"])
    given = dict(tfds="dtd", data_dir=str(tmp_path), train="test[:5]", split="test[5:]")
    entry = kinds.from_entry(ConfigDict(evaluator("linear_probe", **given)))
    assert entry.check() == 8
    result = entry.evaluate(StubPredictor(dict(enumerate(np.eye(2)[labels]))))
    assert (result["train_images"], result["images"]) == (5, 3)
    assert result["top1"] == 1.0


def _command(folder, *arguments):
    given = ["linear-probe", "--checkpoint=aviary-tiny", f"--images={folder / 'test'}"]
    return command.main([*given, f"--output={folder / 'p.json'}", *arguments])


def test_the_command(noisy, monkeypatch, capsys):
    folder, predictor, _, _ = noisy
    monkeypatch.setattr(inference, "load", lambda path, **_: predictor)
    assert _command(folder, f"--train={folder / 'train'}") == 0
    result = json.loads((folder / "p.json").read_text())
    assert list(result["per_class"]) == list(CLASSES)
    assert result["train"] == str(folder / "train")
    table = capsys.readouterr().out
    assert "linear-probe: top1" in table and "linear-probe: mean_per_class" in table


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--train={}/none", "{}/none: no such folder"),
        ("--train={}/test", "train: got {}/test, which are the test's images"),
        ("--train={}/other", "only in one of them: ant, bee, cow"),
        ("--train={}/train", "linear_probe: needs scikit-learn: pip install 'grain_jax[probe]'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(noisy, capsys, monkeypatch, arguments, message):
    folder, find = noisy[0], linear_probe.importlib.util.find_spec
    if "scikit" in message:
        without = lambda x: None if x == "sklearn" else find(x)
        monkeypatch.setattr(linear_probe.importlib.util, "find_spec", without)
    for name in ("ant", "doe"):
        write_picture(folder / "other" / name / "0.png", 0)
    assert _command(folder, *arguments.format(folder).split(" ")) == 2
    error = capsys.readouterr().err
    assert message.format(folder) in error and len(error.splitlines()) == 1
