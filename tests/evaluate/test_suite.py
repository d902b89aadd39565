"""The suite's command on sets in TFDS's format, under their real names, and a class folder; counted by hand.

An image's number says which class the stub takes it for; a class is a direction of its own.
"""

import json
import shutil

import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax import inference
from grain_jax.configs import eval as benchmarks
from grain_jax.core import errors
from grain_jax.evaluate import __main__ as command
from grain_jax.evaluate import class_names, kinds, test_sets
from tests import tiny
from tests.evaluate import tfds_sets
from tests.evaluate.stub import StubPredictor, number, write_picture
from tests.paths import ROOT

# For each image its class, and the class that the stub takes it for by its name.
CIFAR10 = [(0, 0), (1, 1), (2, 0), (3, 3), (3, 3), (3, 5), (9, 9), (9, 8), (9, 7)]
DTD = [(0, 0), (5, 5), (46, 46), (46, 1), (10, 2), (10, 10)]
FLOWERS = [(0, 0), (101, 101), (50, 50), (50, 51), (7, 7)]
PRODUCTS = [(0, 0), (0, 1), (1, 1)]
SETS = {"cifar10": CIFAR10, "dtd": DTD, "oxford_flowers102": FLOWERS, "products2023": PRODUCTS}
NUMBERS = dict(zip(SETS, (0, 20, 40, 60)))  # the first image's


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The sets, and the names of their classes."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("benchmarks")
    names = {"cifar10": class_names.for_labels(None, 10, "cifar10")}
    versions = {"cifar10": "3.0.2", "dtd": "3.0.1", "oxford_flowers102": "2.1.1"}
    for name, version in versions.items():
        labels = None
        if name != "cifar10":  # TFDS has its label names without the data
            labels = tfds.builder(name, data_dir=str(folder)).info.features["label"].names
            known = name if name == "oxford_flowers102" else None
            names[name] = class_names.for_labels(labels, len(labels), known)
        pictures = tfds_sets.numbered(range(NUMBERS[name], NUMBERS[name] + len(SETS[name])))
        own, kind = ([label for label, _ in SETS[name]], "array_record" if name == "dtd" else "tfrecord")
        tfds_sets.write(folder, name, version, "test", pictures, own, labels, kind)
    names["products2023"] = ["air fryer", "e bike"]
    for i, (label, _) in enumerate(PRODUCTS):
        write_picture(folder / "products2023" / ("air_fryer", "e_bike")[label] / f"{i}.png", 60 + i)
    (folder / "templates.txt").write_text("a {}\n")
    return folder, names


def _predictor(names) -> StubPredictor:
    place = {pair: i for i, pair in enumerate((s, c) for s in names for c in names[s])}
    axes = np.eye(len(place))
    texts = {f"a {name}": axes[i] for (_, name), i in place.items()}
    images, regions = {}, {}
    for s, answers in SETS.items():
        for i, (label, taken_for) in enumerate(answers, NUMBERS[s]):
            images[i] = axes[place[s, names[s][taken_for]]]
            regions[i] = np.zeros((2, 4)), axes[[place[s, names[s][label]]] * 2]  # always right
    for c, name in enumerate(names["dtd"]):  # with descriptions, the first two names change places
        other = names["dtd"][1 - c] if c < 2 else name
        texts[f"a {name}, which has {name} parts"] = axes[place["dtd", other]]
        texts[f"{name} parts"] = axes[place["dtd", name]]
    return StubPredictor(images, texts, regions)


@pytest.fixture
def suite(data, tmp_path, monkeypatch):
    """Runs the suite's command: (status, results), and the predictor, which a test may change."""
    folder, names = data
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "descriptions").mkdir()
    described = {name: [f"{name} parts"] for name in names["dtd"]}
    (tmp_path / "descriptions" / "dtd.json").write_text(json.dumps(described))

    def run(*arguments):
        run.predictor.asked.clear()
        monkeypatch.setattr(inference, "load", lambda path, **_: run.predictor)
        monkeypatch.setattr("grain_jax.checkpoint.saved_model.find", lambda path: path)
        keys = dict(data_dir=folder, folders=folder, templates=folder / "templates.txt")
        keys |= dict(descriptions=tmp_path / "descriptions", alphas="(1.0, 0.5, 0.0)")
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        flags += [f"--config={ROOT}/configs/eval.py", f"--output={tmp_path / 'out.json'}"]
        status = command.main(["suite", "--checkpoint=RUN", *flags, *arguments])
        return status, json.loads((tmp_path / "out.json").read_text())

    run.predictor, run.folder = _predictor(names), tmp_path
    return run


def test_every_set_has_the_accuracy_that_was_counted_by_hand(suite, data, capsys):
    status, results = suite()
    out, err = capsys.readouterr()
    ran = results["ran"]
    assert status == 0 and results["failed"] == {} and list(ran) == list(SETS)
    # cifar10 has no names of its own: 0, 1, two of the three 3s and one of the three 9s are right.
    rates = ran["cifar10"]["alpha_1.0"]
    assert rates["top1"] == 5 / 9 and rates["mean_per_class"] == pytest.approx(0.6)
    # Where it is wrong, the nine other classes tie: four of them are among the best five.
    assert rates["top5"] == pytest.approx((5 + 4 * 4 / 9) / 9)
    shares = {"airplane": 1, "automobile": 1, "bird": 0, "cat": 2 / 3, "truck": 1 / 3}
    assert rates["per_class"] == pytest.approx(shares)
    assert ran["cifar10"]["images"] == 9 and ran["cifar10"]["classes"] == 10
    assert ran["oxford_flowers102"]["alpha_1.0"]["top1"] == 4 / 5
    assert ran["oxford_flowers102"]["classes"] == 102
    assert ran["products2023"]["alpha_1.0"]["top1"] == 2 / 3
    # dtd by names: all but two. With descriptions 0 becomes 1; the regions are always right, and tie with
    # the three wrong answers at 0.5.
    dtd = ran["dtd"]
    assert dtd["by_name"]["alpha_1.0"]["top1"] == pytest.approx(4 / 6)
    assert dtd["by_name"]["alpha_1.0"]["mean_per_class"] == 0.75
    found = [dtd[f"alpha_{alpha}"]["top1"] for alpha in (1.0, 0.5, 0.0)]
    assert found == pytest.approx([3 / 6, 4.5 / 6, 1])
    averages = results["averages"]
    assert averages["names"]["sets"] == 4 and averages["described alpha_0.0"]["sets"] == 1
    assert averages["names"]["top1"] == pytest.approx((5 / 9 + 4 / 6 + 4 / 5 + 2 / 3) / 4)

    lines = out.splitlines()
    row = next(line for line in lines if line.startswith("dtd ")).split()
    assert row[1] == "66.7%" and row[-1] == "6"
    assert next(line for line in lines if line.startswith("average ")).split()[1] == "67.2%"
    # What is not there is said, with how to get it; so is what has no descriptions.
    skipped = results["skipped"]
    assert set(skipped) == set(benchmarks.SETS) - set(SETS)
    how = f"tfds.builder('food101', data_dir='{data[0]}').download_and_prepare()"
    assert how in skipped["food101"] and f"food101: skipped: {skipped['food101']}" in err
    assert f"--output {data[0]}/mscoco --split test" in skipped["mscoco"]
    assert "cifar10.json: not there" in results["notes"]["cifar10"]


def test_a_restart_measures_only_what_is_new(suite, capsys):
    assert suite("--only", "cifar10,dtd")[0] == 0
    first = suite.predictor
    suite.predictor = StubPredictor()  # knows no image and no text
    status, results = suite("--only", "cifar10")
    assert status == 0 and list(results["ran"]) == ["cifar10", "dtd"]
    assert "cifar10 (1 of 1): is in" in capsys.readouterr().err
    # Other descriptions: dtd is measured again, cifar10 is not.
    path = suite.folder / "descriptions" / "dtd.json"
    path.write_text(path.read_text() + " ")
    suite.predictor = first
    status, results = suite("--only", "dtd,cifar10,products2023")
    assert status == 0 and list(results["ran"]) == ["cifar10", "dtd", "products2023"]
    assert "a banded" in first.asked and "a airplane" not in first.asked
    assert suite("--only", "cifar10", "--again")[0] == 0 and "a airplane" in first.asked


def test_a_failure_does_not_stop_the_others(suite, capsys):
    (suite.folder / "descriptions" / "cifar10.json").write_text('{"cat": ["whiskers"]}')
    del suite.predictor.images[41]  # of the flowers
    status, results = suite()
    assert status == 1
    assert list(results["ran"]) == ["dtd", "products2023"]
    assert "no description of the classes airplane, automobile" in results["failed"]["cifar10"]
    assert results["failed"]["oxford_flowers102"] == "KeyError: 41"
    assert "failed: oxford_flowers102: KeyError: 41" in capsys.readouterr().out
    # A second run measures only what failed.
    suite.predictor.images[41] = suite.predictor.images[40]
    (suite.folder / "descriptions" / "cifar10.json").unlink()
    status, results = suite()
    assert status == 0 and results["failed"] == {} and "a banded" not in suite.predictor.asked
    assert results["ran"]["oxford_flowers102"]["alpha_1.0"]["top1"] == 3 / 5


def test_usage_and_inputs_that_cannot_be_used_are_status_2(suite, capsys):
    def fault(*arguments):
        (suite.folder / "out.json").write_text("{}")
        assert suite(*arguments)[0] == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "food10: no such entry; did you mean food101?" in fault("--only", "food10")
    assert fault("--only", "food101", "--again") == "nothing could be run"
    split = "--config.evals.food101.split=train"  # asked for: not skipped
    assert suite("--only", "food101", "--again", split)[0] == 1
    assert "holds something else than a suite's results" in fault("--only", "cifar10")
    (suite.folder / "out.json").write_text('{"digest": "x", "folder": "OLD", "ran": {}}')
    assert suite("--only", "products2023")[0] == 2
    assert "another checkpoint (OLD, now RUN)" in capsys.readouterr().err
    assert suite("--only", "products2023", "--again")[0] == 0


def test_entries_serve_a_training_config():
    c = tiny.dictionary(checkpoint_best_metric="eval/cifar10/alpha_1.0/top1")
    c.evals = benchmarks.entries(("cifar10", "lvis"), data_dir="D", folders="F", alphas=(1.0,))
    evals = kinds.from_entries(config_lib.from_dict(c).evals)
    assert list(evals) == ["cifar10", "lvis"]
    one = evals["cifar10"]
    assert (one.tfds, one.data_dir, one.alphas) == ("cifar10", "D", (1.0,))
    assert evals["lvis"].annotations == "F/lvis/A.jsonl" and evals["lvis"].missing == "skip"
    assert set(benchmarks.get_config().evals) == set(benchmarks.SETS)
    assert len(benchmarks.SETS) == 31


def _read(test_set, positions):
    return [(image.name, image.label, number(image.load())) for image in test_set.images(positions)]


@pytest.mark.parametrize("name", ["cifar10", "dtd"])  # TFRecord and ArrayRecord files
def test_a_stretch_of_a_tfds_set_is_that_of_the_whole(data, name):
    given = str(data[0]), "cifar10" if name == "cifar10" else None
    whole = test_sets.TfdsSet(name, "test", *given)
    everything = _read(whole, range(len(whole)))
    labels = {i: label for i, (label, _) in enumerate(SETS[name], NUMBERS[name])}
    assert {i: label for _, label, i in everything} == labels
    assert [place for place, _, _ in everything] == [f"{name} test {i}" for i in range(len(whole))]
    assert _read(whole, range(1, 4)) + _read(whole, range(4, 5)) == everything[1:5]
    assert _read(whole, range(3, 3)) == []
    part = test_sets.TfdsSet(name, "test[2:5]", *given)
    assert len(part) == 3 and _read(part, range(1, 3)) == everything[3:5]


def test_faults_of_tfds_sets(data, tmp_path):
    folder, _ = data
    with pytest.raises(errors.UserError, match="got 'train', expected one of test"):
        test_sets.TfdsSet("dtd", "train", str(folder))
    with pytest.raises(errors.MissingData, match="dtd/9.9.9/dataset_info.json"):
        test_sets.TfdsSet("dtd:9.9.9", "test", str(folder))
    assert test_sets.find_tfds("dtd:3.0.1", str(folder)).name == "3.0.1"
    for version in ("9.0.0", "10.0.0"):
        (tmp_path / "set/b" / version).mkdir(parents=True)
        (tmp_path / "set/b" / version / "dataset_info.json").write_text("{}")
    assert test_sets.find_tfds("set/b", str(tmp_path)) == tmp_path / "set" / "b" / "10.0.0"
    shutil.copytree(folder / "cifar10", tmp_path / "cifar10")
    for path in (tmp_path / "cifar10" / "3.0.2").glob("*tfrecord*"):
        path.write_bytes(path.read_bytes()[:50])
    broken = test_sets.TfdsSet("cifar10", "test", str(tmp_path), "cifar10")
    with pytest.raises(errors.UserError, match="cifar10 test: cannot be read: "):
        list(broken.images(range(9)))
