"""Recipes of configs/: they resolve with every argument, and take weights from elsewhere."""

import importlib
import json

import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.configs import finetune, own
from grain_jax.evaluate import kinds
from grain_jax.evaluate import suite as evaluate
from grain_jax.models import grain
from grain_jax.train import initialise
from tests import perturbed, tiny
from tests.evaluate.stub import write_picture

pytestmark = pytest.mark.long


@pytest.mark.quick
@pytest.mark.parametrize("size", own.SIZES)
@pytest.mark.parametrize("batch_size", [8, 24])
def test_the_own_recipe_takes_these_batch_sizes_without_other_flags(size, batch_size):
    c = own.get_config(size)
    c.batch_size = batch_size
    config = config_lib.from_dict(c)
    assert config.model.decoder.queries == config.input.max_regions and config.loss.box == 0.2
    assert {entry["missing"] for entry in config.evals.values()} == {"skip"}
    assert [config.with_dtype(x).dtype for x in ("cpu", "tpu")] == ["float32", "bfloat16"]


def test_evaluations_are_skipped_until_their_images_are_named(tmp_path, capsys):
    c = own.get_config()
    config = config_lib.from_dict(c)
    assert evaluate.present(kinds.from_entries(config.evals)) == {}
    assert "evals.zeroshot: skipped: no images are named; --config.evals" in capsys.readouterr().err
    region = {"box": [0, 0, 5, 5], "description": "a beak", "score": 1}
    (tmp_path / "A.jsonl").write_text(json.dumps({"image": "0.png", "regions": [region]}))
    write_picture(tmp_path / "0.png", 0)
    c.evals.grounding.update(images=str(tmp_path), annotations=str(tmp_path / "A.jsonl"))
    evals = kinds.from_entries(config_lib.from_dict(c).evals)
    assert evaluate.present(evals) == {"grounding": evals["grounding"]}


def _saved(folder, model):
    params = perturbed.params(model)
    saved_model.save_model(folder, model, params)
    return grain.flat(params)


def test_all_of_a_run_of_ones_own_is_taken(tmp_path):
    model = tiny.config(
        model__decoder__queries=3, model__logit_bias_init=-10.0, loss__contrast="sigmoid"
    ).model
    expected = _saved(tmp_path / "run", model)
    c = finetune.get_config(str(tmp_path / "run"))
    config = config_lib.from_dict(c)
    assert config.model == model and config.input.max_regions == 3
    assert config.loss.contrast == "sigmoid" and config.with_dtype("cpu").dtype == "float32"
    c.optim.lora.rank = 4  # with the recipe's layer_decay
    config_lib.from_dict(c)
    loaded = initialise.load(config).params
    assert loaded.keys() == expected.keys()
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, expected[name])


def test_two_towers_that_were_converted_get_a_decoder(tmp_path):
    c = tiny.dictionary(input__max_regions=0)
    c.model.decoder = None
    c.model.image.update(pool="map", projection="none", width=16, heads=2)
    c.model.text.update(pool="last", causal=False, tokenizer="tokenizer.json", cleaning="none")
    c.text.packing = False
    expected = _saved(tmp_path / "two", config_lib.from_dict(c).model)
    (tmp_path / "two" / "tokenizer.json").write_text("{}")
    config = config_lib.from_dict(finetune.get_config(str(tmp_path / "two")))
    assert config.model.decoder.queries == 8 and not config.text.packing
    assert config.model.text.tokenizer == str(tmp_path / "two" / "tokenizer.json")
    loaded = initialise.load(config).params
    assert loaded.keys() == expected.keys()  # with the pooling and the logit scale


@pytest.mark.parametrize("name", ["vitb16", "plus_vitb16", "vitl14", "vith14"])
def test_the_overrides_of_each_hardware(name):
    recipe = importlib.import_module(f"grain_jax.configs.grain_{name}_cc12m")
    default = recipe.get_config().mesh.fsdp
    for name, overrides in recipe.HARDWARE.items():
        config = config_lib.from_dict(recipe.get_config(name))
        assert 2048 == config.batch_size and config.remat == "none"
        assert config.mesh.fsdp == overrides.get("mesh.fsdp", default)
        assert int(name.split("-")[1]) % config.mesh.fsdp == 0
