"""What ends a run is said before what takes long: before a dataset is made or a program is compiled."""

import importlib.util

import pytest

from grain_jax import config as config_lib
from grain_jax.checkpoint import files
from grain_jax.configs import demo
from grain_jax.core import errors
from grain_jax.evaluate.__main__ import main as evaluate
from grain_jax.input_pipeline import preparation, record_files
from grain_jax.train import run
from tests import record_sets, tiny


class TooLate(Exception):
    """What takes long has begun."""


def _too_late(*_, **__):
    raise TooLate


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"model__text__tokenizer": "/nope/tokenizer.json"}, "/nope/tokenizer.json: no such file"),
        ({"model__text__vocab_size": 600}, "has ids up to 49407, but model.text.vocab_size is 600"),
        ({"init__image": "/nope/tower.npz:params/img"}, "init.image: /nope/tower.npz:params/img: "),
        ({"init__decoder": "/nope"}, "init.decoder: /nope: no such folder"),
        ({"wandb__mode": "online"}, "needs the package wandb"),
        ({"workdir": "a file"}, "--workdir: .*expected a writable folder"),
    ],
)
def test_what_needs_no_data_is_said_before_the_data_set_is_made(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(preparation, "open_or_make", _too_late)
    workdir = tmp_path / overrides.pop("workdir", "workdir")
    if workdir.name == "a file":
        workdir.write_text("")
    config = demo.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    with pytest.raises(errors.UserError, match=message):
        run.train(config_lib.from_dict(config), workdir)


_PLACE = dict(images="{folder}")
_ANNOTATED = dict(annotations="{folder}/A.jsonl", **_PLACE)


@pytest.mark.parametrize(
    "entry,message",
    [
        (dict(kind="zeroshot", images="/nope"), "/nope"),
        (dict(kind="zeroshot", classes="/nope", **_PLACE), "/nope"),
        (dict(kind="grounding", annotations="/nope", **_PLACE), "/nope"),
        (dict(kind="grounding", annotations="{folder}/A.jsonl", images="/nope"), "/nope"),
        (dict(kind="boxes", classes="/nope", **_ANNOTATED), "/nope"),
        (dict(kind="linear_probe", train="/nope", **_PLACE), "/nope"),
        ("a shard", "the shard is gone"),
    ],
)
def test_what_the_data_lacks_is_said_before_anything_is_compiled(
    built, tmp_path, monkeypatch, entry, message
):
    monkeypatch.setattr(run.train_step, "build", _too_late)
    folder, output = built
    keys = dict(input__source="records", input__data_dir=str(output), input__name="tiny_set")
    c = tiny.dictionary(**keys)
    if entry == "a shard":
        (one,) = record_files.find(config_lib.from_dict(c))
        lost, stat = one.shards[2].path, record_files.os.stat
        there = lambda path, *more, **names: stat(path if str(path) != lost else "/nope", *more, **names)
        monkeypatch.setattr(record_files.os, "stat", there)
    else:
        c.evals = {"one": {k: v.format(folder=folder) for k, v in entry.items()} | {"missing": "error"}}
    with pytest.raises(errors.UserError, match=message):
        run.train(config_lib.from_dict(c), tmp_path / "workdir")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(images in a class folder beside A.jsonl, a record set of them)."""
    folder = tmp_path_factory.mktemp("built")
    record_sets.write_annotations(folder / "images", 16)
    assert record_sets.build_set(folder / "images", folder / "data", "--num-shards=4") == 0
    for name in ("a", "b"):
        (folder / "images" / name).mkdir()
        record_sets.picture(3).save(folder / "images" / name / "1.png")
    return folder / "images", folder / "data"


@pytest.mark.parametrize(
    "flags,message",
    [({"--checkpoint": "/nope"}, "/nope"), ({"--output": "/proc/out.json"}, "--output: /proc/out.json: ")],
)
def test_evaluate_looks_for_its_model_and_its_output_before_the_images(
    tmp_path, monkeypatch, capsys, flags, message
):
    from grain_jax.evaluate import grounding

    monkeypatch.setattr(grounding.Grounding, "check", _too_late)
    given = {"--checkpoint": "aviary-tiny", "--output": str(tmp_path / "out.json")} | flags
    given |= {"--images": str(tmp_path), "--annotations": str(tmp_path / "A.jsonl")}
    assert evaluate(["grounding", *(f"{k}={v}" for k, v in given.items())]) == 2
    assert message in capsys.readouterr().err


def test_a_resume_needs_no_weights_that_the_run_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "open_or_make", _too_late)
    monkeypatch.setattr(files, "finished_steps", lambda workdir: [2])
    with pytest.raises(TooLate):
        run.train(tiny.config(init__image="/nope"), tmp_path / "workdir")
