"""`grain_jax.load("aviary-tiny")`: the model that comes with the package, and what other names say."""

import json

import numpy as np
import pytest

import grain_jax
from grain_jax import config as config_lib
from grain_jax.checkpoint import files as checkpoint_files
from grain_jax.checkpoint import pretrained, saved_model
from grain_jax.core import errors
from grain_jax.data.aviary import generate
from grain_jax.data.aviary.samples import birds
from tests.paths import ROOT

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def model():
    return grain_jax.load("aviary-tiny")


def _top1(model, drawn, alpha):
    """The share of birds whose species gets the best score, among the species drawn."""
    classes = {bird.name: bird.descriptions for bird in drawn}
    scores = model.classify([bird.image for bird in drawn], classes, alpha=alpha)
    return np.mean([list(classes)[i] == bird.name for i, bird in zip(scores.argmax(1), drawn)])


@pytest.mark.slow
def test_unseen_species_by_the_descriptions_and_seen_ones_by_name(model):
    unseen, seen = birds(40), birds(60, seen=True)
    assert len({bird.name for bird in unseen}) == 40 and len({bird.name for bird in seen}) == 60
    assert _top1(model, unseen, alpha=0.0) >= 0.95
    assert _top1(model, seen, alpha=1.0) > 0.7


def test_a_part_is_found_where_it_is(model):
    overlaps = []
    for bird in birds(10, seed=1):
        found = model.ground(bird.image, list(bird.boxes_xyxy))
        for (x1, y1, x2, y2), (box, _) in zip(bird.boxes_xyxy.values(), found, strict=True):
            both = max(0, min(x2, box[2]) - max(x1, box[0])) * max(0, min(y2, box[3]) - max(y1, box[1]))
            areas = (x2 - x1) * (y2 - y1) + (box[2] - box[0]) * (box[3] - box[1])
            overlaps.append(both / (areas - both))
    assert np.mean(overlaps) > 0.5


def test_its_files_are_small_and_checked(model):
    folder = ROOT / "grain_jax" / "checkpoint" / "pretrained" / "aviary-tiny"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2_000_000
    stored = json.loads((folder / "config.json").read_text())
    assert set(stored["digests"]) == {"model", "params"} and stored["parity"] == "PROVEN"
    assert config_lib.model_from_dict(stored["model"]) == model.model
    assert {str(x.dtype) for x in model.params["image"]["patch_embed"].values()} == {"float32"}
    used = np.asarray(model.params["text"]["token_embed"]["embedding"]).any(axis=1)
    assert used.sum() == 384


def test_a_folder_of_that_name_comes_first(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {**model.params, "logit_scale": model.params["logit_scale"] + 1}
    saved_model.save_model("aviary-tiny", model.model, params)
    assert grain_jax.load("aviary-tiny").params["logit_scale"] == params["logit_scale"]


@pytest.mark.parametrize("name,meant", [("aviary_tiny", True), ("aviary", True), ("org/name", False)])
def test_another_name_is_one_line(name, meant):
    with pytest.raises(checkpoint_files.CheckpointError) as error:
        grain_jax.load(name)
    hint = "did you mean aviary-tiny? " if meant else ""
    assert str(error.value) == (
        f"{name}: no such folder; {hint}expected a workdir, a checkpoint, a converted model,"
        " aviary-tiny (comes with the package), or hf://ORG/NAME (of the Hugging Face Hub)"
    )


@pytest.mark.parametrize(
    "given, kind, expected",
    [
        ("ViT-B-32", "from-open-clip --input WEIGHTS", "no such folder"),
        ("x.pt", "from-open-clip --input x.pt", "got a file, expected a folder"),
        ("lit.npz", "from-big-vision --input lit.npz", "got a file"),
        ("a.pth.tar", "from-torch --input a.pth.tar", "got a file"),
    ],
)
def test_weights_of_others_name_the_command(given, kind, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "." in given:
        (tmp_path / given).touch()
    with pytest.raises(errors.UserError, match=expected) as error:
        grain_jax.load(given)
    said = str(error.value)
    assert f"grain-jax convert {kind}" in said and "--output DIR" in said and "\n" not in said


def test_the_names_are_the_folders():
    folders = {
        path.parent.name for path in (ROOT / "grain_jax" / "checkpoint" / "pretrained").glob("*/README.md")
    }
    assert folders == set(pretrained.NAMES)


def test_sample_birds_are_new_images():
    again = birds(3)
    for bird, same, other in zip(birds(3), again, birds(3, seed=1)):
        assert bird.image.tobytes() == same.image.tobytes() != other.image.tobytes()
        assert bird.image.size == (64, 64) and set(bird.boxes_xyxy) <= set(bird.descriptions)
        assert all(0 <= edge <= 1 for box in bird.boxes_xyxy.values() for edge in box)
    held_out = {one.name for one in generate.species_of(generate.Settings()).held_out}
    assert {bird.name for bird in birds(40)} == held_out
    assert birds(1, size=128)[0].image.size == (128, 128)
