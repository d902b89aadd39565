"""Configs: every shipped one resolves; a wrong key or value is a line with its key; each key has one declaration."""

import dataclasses
import functools
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.config import keys, recipe
from grain_jax.config.fields import Config
from grain_jax.evaluate import base, kinds
from tests import tiny
from tests.paths import ROOT

SHIPPED = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "eval"])
def test_shipped_configs_resolve(name):
    config = config_lib.from_dict(importlib.import_module(f"grain_jax.configs.{name}").get_config())
    kinds.from_entries(config.evals, config.model)
    assert config_lib.from_dict(json.loads(config_lib.to_json(config))) == config


def test_reference_config_restores_what_the_spec_lists():
    c = config_lib.from_dict(importlib.import_module("grain_jax.configs.reference").get_config())
    assert not c.text.packing and c.loss.group_size == 128 and not c.loss.mask_duplicates
    assert c.loss.box == 1.5 and c.model.image.block_init == "torch" and c.reference


TWO_TOWERS = {"model.decoder": None, "model.image.pool": "class"}
# Keys that are set, and the beginning of the fault.
FAULTS = [
    ({"optim.learning_rte": 1.0}, "optim.learning_rte: no such key; did you mean optim.learning_rate?"),
    ({"loss.zzz": 1}, "loss.zzz: no such key; there are: loss.image_caption,"),
    ({"input.datasets": [{"name": "a", "data_dir": "x"}]}, "input.datasets[0].weight: missing"),
    ({"batch_size": "x"}, "batch_size: got 'x', expected int"),
    ({"input.captions_per_image": 4}, "input.captions_per_image: got 4, expected int, 1 to 3"),
    ({"input.flip_rate": 7.0}, "input.flip_rate: got 7.0, expected float, 0 to 1"),
    ({"optim.learning_rate": float("nan")}, "optim.learning_rate: got nan, expected a finite number"),
    ({"total_steps": 2**31}, "total_steps: got 2147483648, expected int or None, at least 1"),
    ({"dtype": "float46"}, "dtype: got 'float46', expected one of float32, bfloat16"),
    ({"evals": None}, "evals: got None, expected a group of keys"),
    ({"evals.x": {}}, "evals.x.kind: got None, expected"),
    ({"total_epochs": 1.0}, "total_steps, total_epochs: exactly one must be set"),
    ({"input.lanes": 3}, "input.lanes: got 3, expected a divisor of batch_size = 16; set"),
    ({"model.image.patch_size": 5}, "model.image.image_size: got 16, expected a multiple of"),
    ({"loss.match_l1": 0.0, "loss.match_giou": 0.0}, "loss.match_l1, loss.match_giou, loss.match_des"),
    (
        {"input.captions_per_image": 2, "input.descriptions_in_captions": 8},
        "input.descriptions_in_captions: got 8, expected 0",
    ),
    ({"loss.box_description": 1.0}, "loss.box_description: got 1.0, expected 0"),
    ({"model.boxes.kind": "roi_align"}, "loss.box_description: got 0.0, expected more than 0"),
    ({"loss.hard_negative": 0.5}, "loss.hard_negative: got 0.5, expected 0 with input.negatives_per"),
    (
        TWO_TOWERS | {"input.negatives_per_region": 2}
        | {"loss.hard_negative": 1.0, "loss.image_description": 1.0},
        "loss.hard_negative: got 1.0, expected 0 without model.decoder",
    ),
    (
        {"input.negatives_per_region": 2, "input.max_regions": 0},
        "input.negatives_per_region: got 2, expected 0",
    ),
    (
        {"input.text_length": 16, "model.text.causal": False, "text.packing": False},
        "input.text_length: got 16, expected 0",
    ),
]  # fmt: skip


def _changed(changes):
    """The config of tests/tiny.py as a dict, with values at these keys."""
    values = tiny.dictionary().to_dict()
    for key, value in changes.items():
        *groups, leaf = key.split(".")
        functools.reduce(dict.__getitem__, groups, values)[leaf] = value
    return values


@pytest.mark.parametrize("changes, message", FAULTS)
def test_faults_are_named(changes, message):
    with pytest.raises(config_lib.ConfigError) as caught:
        config_lib.from_dict(_changed(changes))
    assert any(line.startswith(message) for line in str(caught.value).splitlines())


def test_numbers_of_numpy_become_those_of_python():
    rate, mean = np.float64(0.5), (np.float64(0.25),) * 3
    config = config_lib.from_dict(_changed({"optim.b1": rate, "model.image.pixel_mean": mean}))
    numbers = (config.optim.b1, *config.model.image.pixel_mean)
    assert numbers == (0.5, 0.25, 0.25, 0.25) and {type(x) for x in numbers} == {float}


def test_all_faults_of_a_config_are_reported_at_once():
    with pytest.raises(config_lib.ConfigError) as caught:
        config_lib.from_dict(_changed({"loss.bx": 1.0, "seed": None}))
    assert len(str(caught.value).splitlines()) == 2


def test_every_key_is_read_and_explained():
    """A key that nothing reads is a switch that does nothing."""
    files = [p for p in (ROOT / "grain_jax").rglob("*.py") if not p.name.endswith("fields.py")]
    code = "\n".join(p.read_text() for p in files)
    items = [*keys.listed(Config), *keys.listed(base.Evaluator)]
    assert not [item.name for item in items if f".{item.key.name}" not in code]
    items += [item for kind in kinds.KINDS for item in keys.listed(kinds.find(kind))]
    assert not [i.name for i in items if not i.key.declared.get("help") and i.name != "kind"]


# The keys of each role; every other key decides the numbers of a step.
ROLES = {
    "order": "seed batch_size input.source input.options input.name input.lanes input.shards_per_block"
    " input.datasets input.datasets.name input.datasets.weight input.datasets.split",
    "result": "total_steps total_epochs eval_every evals init.image init.text init.resize init.decoder",
    "free": "microbatches remat model.attention model.mlp log_every checkpoint_every checkpoint_every_minutes checkpoint_keep"
    " checkpoint_keep_every checkpoint_best_metric checkpoint_best_mode pictures profile_start"
    " profile_steps wandb.mode wandb.project wandb.name input.data_dir input.datasets.data_dir"
    " input.prepare input.reader_threads text.max_dropped_share loss.tile loss.gather loss.precision mesh.data"
    " mesh.fsdp mesh.tensor mesh.dcn_data sharding",
}


def test_every_key_has_a_role():
    roles = {item.name.replace("[]", ""): item.role for item in keys.listed(Config)}
    expected = {key: role for role, names in ROLES.items() for key in names.split()}
    assert {key: role for key, role in roles.items() if role != "numbers"} == expected
    groups = {key.partition(".")[0] for key, role in roles.items() if role == "numbers"}
    assert groups == {"dtype", "ema_decay", "model", "input", "text", "loss", "optim", "reference"}


def test_the_recipe_has_the_declared_keys_with_their_defaults():
    c = recipe.base()
    assert json.loads(json.dumps(c.to_dict())) == json.loads(
        config_lib.to_json(config_lib.Config())
    )
    unset = {"total_steps": int, "total_epochs": float, "input.prepare": str, "init.image": str}
    for key, kind in {**unset, "input.lanes": int, "model.logit_bias_init": float}.items():
        *groups, leaf = key.split(".")
        part = functools.reduce(lambda group, name: group[name], groups, c)
        assert part[leaf] is None and part.get_type(leaf) is kind
    names = {item.name for item in keys.listed(Config) if "[]" not in item.name}
    groups = {"evals", "loss.terms", "model.image.options", "model.text.options", "input.options"}
    assert names - set(config_lib.flatten(c.to_dict())) <= groups | {"model.decoder"}


def test_the_part_of_a_config_by_roles():
    sets = [{"name": "a", "data_dir": "x", "weight": 2.0}]
    entry = {"kind": "retrieval", "images": "test"}
    c = config_lib.from_dict(_changed({"input.datasets": sets, "evals.x": entry}))
    expected = {"seed": 0, "batch_size": 16, "input.source": "synthetic", "input.name": ""}
    expected |= {"input.lanes": 4, "input.shards_per_block": 1, "input.datasets[0].name": "a"}
    expected |= {"input.datasets[0].weight": 2.0, "input.datasets[0].split": "train"}
    assert config_lib.select(c, {"order"}) == expected
    result = config_lib.select(c, {"result"})
    assert (result["total_steps"], result["init.resize"]) == (10, "bilinear")
    assert (result["evals.x.kind"], result["evals.x.images"]) == ("retrieval", "test")
    numbers = config_lib.select(
        dataclasses.replace(c, model=dataclasses.replace(c.model, decoder=None)), {"numbers"}
    )
    assert numbers["model.decoder"] is None and numbers["model.image.width"] == 32
    assert not {"loss.tile", "text.max_dropped_share", "input.data_dir"} & numbers.keys()


def test_configs_import_little():
    code = (
        "import sys; before = {*sys.modules}\n"
        "from grain_jax.configs import demo; demo.get_config()\n"
        "print(*(m for m in sys.modules if m.startswith('grain_jax')))\n"
        f"import importlib\nfor name in {SHIPPED}: importlib.import_module('grain_jax.configs.' + name).get_config()\n"
        "new = {m.split('.')[0] for m in {*sys.modules} - before}\n"
        "print(*(m for m in new if '-packages' in str(getattr(sys.modules[m], '__file__', ''))))"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True)
    modules, packages = done.stdout.splitlines()
    allowed = "absl contextlib2 etils ml_collections msgspec six typing_extensions yaml _yaml"
    assert {*packages.split()} <= {*allowed.split()}
    assert len(modules.split()) <= 28


@pytest.mark.parametrize(
    "name, facts",
    [
        ("batch_size", ("int", "2048", "at least 1", "order")),
        ("input.datasets[].weight", ("float", "", "", "order")),
        ("model.decoder", ("group or None", "the keys below", "", "numbers")),
        (
            "model.image.activation",
            ("str", "'gelu'", "one of gelu, gelu_tanh, quick_gelu, relu, silu", "numbers"),
        ),
    ],
)
def test_a_key_in_words(name, facts):
    (item,) = [item for item in keys.listed(Config) if item.name == name]
    key = item.key
    assert (key.type_words, key.default_words, key.values_words, item.role) == facts
