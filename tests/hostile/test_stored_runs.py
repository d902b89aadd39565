"""Workdirs and checkpoints from strangers, and damaged ones: nothing that they name runs."""

import shutil

import numpy as np
import pytest

import grain_jax
from grain_jax.checkpoint import files, saved_model
from grain_jax.convert.exits import tokenizers
from grain_jax.input_pipeline import tokenizer
from grain_jax.train import run
from tests import runs, tiny

RUN = dict(total_steps=2, checkpoint_every=1, **tiny.SHALLOW)  # as in test_data_identity.py


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    """2 steps on one device; both checkpoints are kept."""
    workdir = tmp_path_factory.mktemp("run")
    run.train(tiny.config(**RUN), workdir)
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


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


def test_a_tokenizer_outside_the_checkpoint_is_not_copied(copy, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("the user's own")
    config = tiny.config(**RUN, model__text__tokenizer=str(secret))
    for name in (str(secret), "../../../secret.json", "link.json"):
        runs.forge_config(copy, tiny.config(**RUN, model__text__tokenizer=name))
        link = copy / "checkpoints" / "2" / "link.json"
        if name == "link.json" and not link.exists():
            link.symlink_to(secret)
        model = grain_jax.load(copy)
        made, why = tokenizers.alone(model.model.text, model.folder)
        assert not made and "is no file in the folder of the model" in why, name
    runs.forge_config(copy, config)
    (copy / "secret.json").write_text("the run's")
    model = grain_jax.load(copy)
    assert tokenizer.own_file(model.model.text, model.folder) == copy / "secret.json"


@pytest.mark.parametrize("missing", ["state", "_CHECKPOINT_METADATA", "state/manifest.ocdbt"])
def test_a_checkpoint_that_lacks_a_part_falls_back_or_says_so(copy, missing, caplog):
    path = copy / "checkpoints" / "2" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert saved_model.load_model(copy)[2].endswith("/checkpoints/1")
    assert "checkpoints/2 is damaged, reading the checkpoint before it" in caplog.text
    shutil.rmtree(copy / "checkpoints" / "1")
    with pytest.raises(files.CheckpointError, match="2: damaged: .*; put back a copy"):
        saved_model.load_model(copy)
