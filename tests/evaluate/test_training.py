"""Entries of a suite as evaluators of a run: what is missing is skipped, processes measure as one."""

import collections
import json
import subprocess
import sys
import types

import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.config import loading
from grain_jax.configs import demo
from grain_jax.core import errors
from grain_jax.evaluate import kinds, suite
from grain_jax.train import journal, run
from tests import tiny
from tests.evaluate import sharded, suite_config
from tests.evaluate.stub import StubPredictor, region, write_lines, write_picture
from tests.paths import ROOT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """11 images of three classes, with descriptions and annotations."""
    folder = tmp_path_factory.mktemp("data")
    names, lines = ["cat"] * 5 + ["dog"] * 3 + ["fox"] * 3, []
    for i, name in enumerate(names):
        write_picture(folder / "classes" / name / f"{i}.png", i * 20, size=(7, 9))
        regions = [region([0, 0, 2 + i % 5, 9], f"{name} fur")]
        lines.append({"image": f"{name}/{i}.png", "caption": f"{name} {i}", "regions": regions})
    write_lines(folder / "A.jsonl", lines)
    write_lines(folder / "D.json", [{name: [f"{name} fur", "a tail"] for name in set(names)}])
    return folder


def test_what_is_there_is_measured_and_what_is_not_is_said(data, tmp_path, capfd, monkeypatch):
    wanted = tiny.dictionary(total_steps=2, eval_every=1, checkpoint_keep=1)
    wanted.evals = suite_config.get_config(data).evals
    wanted.checkpoint_best_metric = "eval/absent/alpha_1.0/top1"
    config = config_lib.from_dict(wanted)
    with pytest.raises(errors.UserError, match="but evals.absent is skipped"):
        run.train(config, tmp_path)
    assert f"evals.absent: skipped: {data}/absent: not there; to get it: ask" in capfd.readouterr().err
    random = np.random.default_rng(0)
    some = lambda make: collections.defaultdict(make, {None: 0})
    vectors = some(lambda: random.normal(size=6))
    regions = some(lambda: ([[0, 0, 0.5, 1], [0, 0, 1, 1]], random.normal(size=(2, 6))))
    predictor = StubPredictor(vectors, vectors, regions)
    monkeypatch.setattr(journal, "make_predictor", lambda *_, **__: predictor)
    state = types.SimpleNamespace(step=np.int32(7))
    evaluators = suite.present(kinds.from_entries(config.evals))
    results = journal.evaluate_all(config, evaluators, state)
    assert {key.split("/")[1] for key in results} == {"classes", "probe", "retrieval", "grounding"}
    assert results["eval/classes/images"] == 11.0 and results["eval/classes/descriptions"] == 6.0
    assert 0 <= results["eval/classes/by_name/alpha_0.5/mean_per_class"] <= 1
    assert results["eval/probe/images"] + results["eval/probe/train_images"] == 11
    assert 0 <= results["eval/probe/top1"] <= 1


def test_the_demo_on_other_data_skips_its_aviary(tmp_path, monkeypatch, capfd):
    config = config_lib.from_dict(demo.get_config())
    monkeypatch.chdir(tmp_path)  # where no aviary is
    assert suite.present(kinds.from_entries(config.evals)) == {}
    lines = capfd.readouterr().err.splitlines()
    get = "not there; to get it: grain-jax aviary --output runs/aviary"
    assert len(lines) == 5
    assert lines[-1] == f"evals.unseen: skipped: runs/aviary/unseen: {get}"


def test_what_the_command_line_asks_for_is_not_skipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overridden = lambda *keys: loading.load("demo", [f"--config.evals.{key}" for key in keys])
    present = lambda *keys: suite.present(kinds.from_entries(overridden(*keys).evals))
    for override, said in {
        "seen.images=/nope": "/nope: no such folder; expected one with",
        "seen.images=": "images: got nothing, expected class folders; to get it: grain",
        "seen.alphas=(1.0,)": "runs/aviary/seen: no such folder",
        "grounding.annotations=/n.jsonl": "runs/aviary/test: no such folder;",
    }.items():
        with pytest.raises(errors.UserError) as found:
            present(override)
        assert str(found.value).startswith(f"evals.{override.partition('.')[0]}: {said}")
    assert present("seen.missing=skip", "seen.images=/nope") == {}


def _without_times(numbers):
    return {key: value for key, value in numbers.items() if not key.endswith("/seconds")}


@pytest.mark.long
def test_a_sharded_model_measures_what_one_device_measures(data):
    one, two, eight = (_without_times(sharded.numbers(data, devices)) for devices in (1, 2, 8))
    assert len(one) > 40 and one["eval/classes/images"] == 11
    assert two == pytest.approx(one, abs=1e-6) and eight == pytest.approx(one, abs=1e-6)
    (data / "classes" / "fox" / "8.png").rename(data / "fox.png")
    (data / "classes" / "fox" / "8.png").write_bytes(
        b"no picture"
    )  # of the second process, which has fewer then
    eight = _without_times(sharded.numbers(data, 8))
    command = [
        sys.executable,
        "-m",
        "grain_jax.launch.local",
        "--processes=2",
        "--devices-per-process=4",
        "--",
    ]
    command += [sys.executable, "-m", "tests.evaluate.sharded", str(data)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    (data / "fox.png").rename(data / "classes" / "fox" / "8.png")
    assert done.returncode == 0, done.stderr
    said = [line.split("measured ")[1] for line in done.stderr.splitlines() if "] measured " in line]
    assert len(said) == 2 and eight["eval/classes/images"] == 10
    for line in said:
        assert _without_times(json.loads(line)) == pytest.approx(eight, abs=1e-6)
