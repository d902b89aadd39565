"""The trainer as a whole: metrics, checkpoints, resume after SIGKILL, NaN, other meshes, a finished run."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import grain_jax
from grain_jax import checkpoint, config, errors, monitor, sharding, train
from tests import tiny
from tests.paths import ROOT

TIMINGS = ("images_per_second", "input_wait_fraction", "model_flops_per_second")


def _lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 10 steps on a (8, 1, 1) mesh."""
    workdir = tmp_path_factory.mktemp("run")
    train.train(tiny.config(), workdir)
    return workdir


def test_workdir_holds_what_the_contract_says(finished):
    for name in ("config.json", "metrics.jsonl", "checkpoints/10", "checkpoints/8", "tensorboard"):
        assert (finished / name).exists(), name
    assert not (finished / "checkpoints" / "4").exists()  # checkpoint_keep = 2
    assert config.from_dict(json.loads((finished / "config.json").read_text())) == tiny.config()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    for key in (
        "loss",
        "loss_image_caption",
        "loss_region_description",
        "loss_box",
        "logit_scale",
        "learning_rate",
        "texts_dropped",
        *TIMINGS,
    ):
        assert all(np.isfinite(line[key]) for line in lines), key
    np.testing.assert_allclose(lines[0]["logit_scale"], 1 / 0.07, rtol=1e-5)
    np.testing.assert_allclose(
        [line["loss"] for line in lines],
        [
            sum(line[f"loss_{k}"] for k in ("image_caption", "region_description", "box"))
            for line in lines
        ],
        rtol=1e-5,
    )
    assert lines[0]["learning_rate"] == pytest.approx(1e-6) and lines[-1]["loss"] < lines[0]["loss"]


def test_the_finished_run_loads_and_runs_again_to_no_effect(finished):
    before = _lines(finished)
    train.train(tiny.config(), finished)
    assert _lines(finished) == before
    model = grain_jax.load(finished)
    images = np.zeros((3, 16, 16, 3), np.uint8)
    np.testing.assert_allclose(np.linalg.norm(model.encode_image(images), axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("mesh", [(4, 2, 1), (2, 2, 2)])
def test_other_meshes_have_the_same_losses(finished, mesh, tmp_path):
    data, fsdp, tensor = mesh
    train.train(
        tiny.config(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, checkpoint_every=0),
        tmp_path,
    )
    for a, b in zip(_lines(finished), _lines(tmp_path)):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=2e-4)


def test_a_checkpoint_goes_on_on_another_mesh(finished, tmp_path):
    (tmp_path / "checkpoints").mkdir(parents=True)
    (tmp_path / "checkpoints" / "8").symlink_to(finished / "checkpoints" / "8")
    train.train(tiny.config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2), tmp_path)
    for a, b in zip(_lines(finished)[8:], _lines(tmp_path), strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-4)


def test_nan_stops_the_run_and_names_the_term(tmp_path):
    broken = tiny.config(optim__learning_rate=1e30, optim__warmup_steps=3, checkpoint_every=1)
    with pytest.raises(
        monitor.NotFinite, match=r"loss_image_caption is nan at step \d; it was finite at step \d"
    ):
        train.train(broken, tmp_path)
    assert len(_lines(tmp_path)) < 10
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())  # none half written
    assert steps and steps[-1] <= len(_lines(tmp_path))


def test_a_checkpoint_of_another_model_is_refused_by_name(finished, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "8").symlink_to(finished / "checkpoints" / "8")
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"params/decoder/query_embed: stored \(6, 32\), expected \(4, 32\)",
    ):
        train.train(tiny.config(model__decoder__queries=3), tmp_path)


@pytest.mark.parametrize("key,value", [("seed", 1), ("input__lanes", 8)])
def test_a_run_that_would_see_other_data_is_refused(finished, tmp_path, key, value):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "8").symlink_to(finished / "checkpoints" / "8")
    with pytest.raises(
        checkpoint.CheckpointError, match=rf"{key.replace('__', '.')}: the run .* got {value}"
    ):
        train.train(tiny.config(**{key: value}), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_missing_evaluation_set_is_found_before_training(tmp_path):
    from configs import common

    c = tiny.dictionary()
    c.evals.birds = common.evaluator("zeroshot", str(tmp_path / "nothing"))
    with pytest.raises(errors.UserError, match="nothing"):
        train.train(config.from_dict(c), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(sharding.ShardingError):
        train.train(tiny.config(mesh__data=3), tmp_path)


def _start(workdir, cache, *flags):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "grain_jax.train",
            "--config",
            "tests/run_config.py",
            "--workdir",
            str(workdir),
            *flags,
        ],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def test_sigkill_and_the_same_command_again_give_the_uninterrupted_run(tmp_path):
    flags = ("--config.total_steps=40", "--config.checkpoint_every=3")
    _finish(_start(tmp_path / "whole", tmp_path / "cache", *flags))
    killed = _start(tmp_path / "killed", tmp_path / "cache", *flags)
    deadline = time.monotonic() + 300
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while time.monotonic() < deadline and killed.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 8:
            break
        time.sleep(0.01)
    assert killed.poll() is None, "it ended before it could be killed"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(_lines(tmp_path / "killed")) < 40
    _finish(_start(tmp_path / "killed", tmp_path / "cache", *flags))
    assert _lines(tmp_path / "killed") == _lines(tmp_path / "whole")


def test_two_processes_have_the_losses_of_one(finished, tmp_path):
    command = [
        sys.executable,
        "-m",
        "launch.local",
        "--processes=2",
        "--devices-per-process=4",
        "--",
    ]
    command += [sys.executable, "-m", "grain_jax.train", "--config", "tests/run_config.py"]
    command += ["--workdir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for a, b in zip(_lines(finished), _lines(tmp_path), strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-4)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "8"]
