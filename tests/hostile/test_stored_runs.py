"""Workdirs and checkpoints from strangers, and damaged ones: nothing that they name runs, no other model is loaded."""

import json
import logging
import random
import shutil

import jax
import numpy as np
import pytest

import grain_jax
from grain_jax import train
from grain_jax.convert import export
from grain_jax.core import errors
from grain_jax.runtime import checkpoint
from tests import runs, tiny

RUN = dict(total_steps=2, checkpoint_every=1, **tiny.SHALLOW)  # as in test_data_identity.py


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """2 steps on one device; both checkpoints are kept."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        device = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: device)
        train.train(tiny.config(**RUN), workdir)
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def converted(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    model, params, _ = checkpoint.load_model(finished)
    checkpoint.save_model(folder, model, params, source="test")
    return folder


def test_a_forged_workdir_runs_no_command(copy, tmp_path, monkeypatch):
    """`input.prepare` names a command; it runs where the user passes that config to the trainer alone."""
    marker = tmp_path / "ran"
    (tmp_path / "hostile_module.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    source = dict(
        input__source="records",
        input__data_dir=str(tmp_path / "missing"),
        input__name="birds",
        input__prepare="hostile_module --output {data_dir}",
    )
    runs.forge_config(copy, tiny.config(**RUN, **source))
    grain_jax.load(copy).encode_text(np.ones((1, 4), np.int32))
    assert not marker.exists()


def test_a_tokenizer_outside_the_checkpoint_is_not_copied(copy, tmp_path, capsys):
    secret = tmp_path / "secret.json"
    secret.write_text("the user's own")
    config = tiny.config(**RUN, model__text__tokenizer=str(secret))
    for name in (str(secret), "../../../secret.json", "link.json"):
        runs.forge_config(copy, tiny.config(**RUN, model__text__tokenizer=name))
        link = copy / "checkpoints" / "2" / "link.json"
        if name == "link.json" and not link.exists():
            link.symlink_to(secret)
        out = tmp_path / "out"
        export._copy_tokenizer(grain_jax.load(copy), out)
        assert not out.exists() and "was not copied" in capsys.readouterr().err, name
    runs.forge_config(copy, config)
    (copy / "secret.json").write_text("the run's")
    (tmp_path / "out").mkdir()
    export._copy_tokenizer(grain_jax.load(copy), tmp_path / "out")
    assert (tmp_path / "out" / "secret.json").read_text() == "the run's"


def _same(found, expected) -> bool:
    (model, params, _), (model_before, params_before, _) = found, expected
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(params_before), strict=True)
    return model == model_before and all(np.array_equal(x, y) for x, y in pairs)


def flip_bits(folder, read, seed: int, count: int) -> dict[str, int]:
    """Flips one random bit of one random file below `folder` at a time; what became of reading it.

    Every second flip is in a file chosen without regard to its size, so that small ones are hit as well.
    """
    expected, rng = read(), random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    outcomes = {"refused": 0, "the same model": 0, "the checkpoint before": 0}
    for i in range(count):
        path = rng.choice(files) if i % 2 else rng.choices(files, sizes)[0]
        before = path.read_bytes()
        place = rng.randrange(8 * len(before))
        damaged = bytearray(before)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = read()
        except errors.UserError as error:
            assert "\n" not in str(error), error
            outcomes["refused"] += 1
        else:
            if found[2] != expected[2]:
                outcomes["the checkpoint before"] += 1
            else:
                assert _same(found, expected), f"{path}, bit {place}: another model was loaded"
                outcomes["the same model"] += 1
        path.write_bytes(before)
    return outcomes


@pytest.mark.parametrize("count", [8, pytest.param(500, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_a_checkpoint_is_loaded_unnoticed(copy, count, caplog):
    newest = copy / "checkpoints" / "2"
    with caplog.at_level(logging.ERROR):
        outcomes = flip_bits(newest, lambda: checkpoint.load_model(copy), seed=0, count=count)
    print(outcomes)
    assert sum(outcomes.values()) == count and outcomes["the checkpoint before"] > count // 4
    assert outcomes["refused"] == 0


@pytest.mark.parametrize("count", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_a_converted_model_is_loaded_unnoticed(converted, tmp_path, count):
    folder = tmp_path / "model"
    shutil.copytree(converted, folder)
    outcomes = flip_bits(folder, lambda: checkpoint.load_model(folder), seed=1, count=count)
    print(outcomes)
    assert outcomes["refused"] > count // 4


@pytest.mark.parametrize("missing", ["state", "config", "digests", "state/manifest.ocdbt"])
def test_a_checkpoint_that_lacks_a_part_falls_back_or_says_so(copy, missing, caplog):
    path = copy / "checkpoints" / "2" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert checkpoint.load_model(copy)[2].endswith("/checkpoints/1")
    assert "checkpoints/2 is damaged, reading the checkpoint before it" in caplog.text
    shutil.rmtree(copy / "checkpoints" / "1")
    with pytest.raises(checkpoint.CheckpointError, match="2: damaged: .*; put back a copy"):
        checkpoint.load_model(copy)


def test_every_command_that_reads_a_model_says_that_it_is_damaged(converted, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(converted, folder)
    content = json.loads((folder / "config.json").read_text())
    content["model"]["image"]["norm_eps"] *= 2
    (folder / "config.json").write_text(json.dumps(content))
    from grain_jax.convert import __main__ as convert_command

    for main, words in (
        (export.main, ["--checkpoint", folder]),
        (convert_command.main, ["to-hf", "--input", folder]),
    ):
        assert main([*map(str, words), "--output", str(tmp_path / "out")]) == 2
        assert "model: not what config.json has the digest of" in capsys.readouterr().err
    with pytest.raises(checkpoint.CheckpointError, match="damaged: model: not what config.json"):
        grain_jax.load(folder)
