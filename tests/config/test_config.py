"""Configs: every shipped one resolves; a wrong key or value is a line; each key has one declaration."""

import dataclasses
import functools
import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.config import keys, loading, recipe
from grain_jax.config.fields import Config
from grain_jax.core import errors
from grain_jax.evaluate import base, kinds
from tests import tiny
from tests.paths import ROOT

pytestmark = pytest.mark.quick

NEEDS_A_MODEL = "regions"  # has no default argument
SHIPPED = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", NEEDS_A_MODEL))


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "eval"])
def test_shipped_configs_resolve(name):
    config = config_lib.from_dict(importlib.import_module(f"grain_jax.configs.{name}").get_config())
    kinds.from_entries(config.evals, config.model)
    assert config_lib.from_dict(json.loads(config_lib.to_json(config))) == config


BOXES = {"model.boxes.kind": "roi_align", "model.boxes.proposals": True, "loss.box_description": 1.0}
# Keys that are set, and the beginning of the fault.
FAULTS = [
    ({"optim.learning_rte": 1.0}, "optim.learning_rte: no such key; did you mean optim.learning_rate?"),
    ({"input.datasets": [{"name": "a", "data_dir": "x"}]}, "input.datasets[0].weight: missing"),
    ({"batch_size": "x", "loss.bx": 1.0}, "batch_size: got 'x', expected int"),
    ({"input.flip_rate": 7.0}, "input.flip_rate: got 7.0, expected float, 0 to 1"),
    ({"optim.learning_rate": float("nan")}, "optim.learning_rate: got nan, expected a finite number"),
    ({"dtype": "float46"}, "dtype: got 'float46', expected one of float32, bfloat16"),
    ({"evals": None}, "evals: got None, expected a group of keys"),
    ({"total_epochs": 1.0}, "total_steps, total_epochs: exactly one must be set"),
    ({"input.lanes": 3}, "input.lanes: got 3, expected a divisor of batch_size = 16; set"),
    ({"text.pack_group": 8}, "text.pack_group: got 8, expected a divisor of 4 images per lane; set"),
    ({"input.text_length": 2}, "input.text_length: got 2, expected 3 to model.text.context_length"),
    ({"model.decoder.reads_box": True}, "model.decoder.reads_box: got True, expected False, or a box"),
    ({"model.image.patch_size": 5}, "model.image.image_size: got 16, expected a multiple of"),
    ({"loss.box_description": 1.0}, "loss.box_description: got 1.0, expected 0"),
    ({"model.boxes.proposals": True}, "model.boxes.proposals: got True, expected False, or a box head ("),
    (BOXES, "model.boxes.proposals: got True, expected False, or model.decoder.boxes=pointer, or"),
    ({**BOXES, "model.decoder.boxes": "pointer", "loss.box": 0.0}, "loss.box: got 0.0, expected more than 0"),
    ({"loss.hard_negative": 0.5}, "loss.hard_negative: got 0.5, expected 0 with input.negatives_per"),
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


def test_own_images_with_a_decoder_and_without():
    """Both count regions by agreement; without a decoder they are boxes of patches."""
    flags = ["--config.input.data_dir=records", "--config.input.name=mine"]
    grain, patches = (loading.load(f"own:tiny{kind}", flags) for kind in ("", ",patches"))
    assert grain.loss.agreement and patches.loss.agreement and grain.model.decoder.boxes == "pointer"
    assert patches.model.decoder is None and patches.model.image.pool == "map"
    assert patches.model.patches_predict_boxes and patches.loss.region_description == 0
    with pytest.raises(errors.UserError, match="got 'tiny,queries', expected one of tiny"):
        loading.load("own:tiny,queries", flags)


def test_every_key_is_read_and_explained():
    """A key that nothing reads is a switch that does nothing."""
    files = [p for p in (ROOT / "grain_jax").rglob("*.py") if not p.name.endswith("fields.py")]
    code = "\n".join(p.read_text() for p in files)
    items = [*keys.listed(Config), *keys.listed(base.Evaluator)]
    assert not [i.name for i in items if not re.search(rf'[."]{i.key.name}\b', code)]
    items += [item for kind in kinds.KINDS for item in keys.listed(kinds.find(kind))]
    assert not [i.name for i in items if not i.key.declared.get("help") and i.name != "kind"]


# The keys of each role; every other key decides the numbers of a step.
ROLES = {
    "order": "seed batch_size input.source input.options input.name input.lanes input.shards_per_block"
    " input.datasets input.datasets.name input.datasets.weight input.datasets.split",
    "result": "total_steps total_epochs eval_every evals init.image init.text init.decoder",
    "free": "microbatches remat model.attention log_every checkpoint_every checkpoint_every_minutes"
    " checkpoint_keep checkpoint_keep_every checkpoint_best_metric checkpoint_best_mode report_images"
    " profile_start profile_steps profile_port wandb.mode wandb.project wandb.name input.data_dir"
    " input.datasets.data_dir input.prepare input.reader_threads text.max_dropped_share loss.tile"
    " loss.precision mesh.data mesh.fsdp mesh.tensor mesh.dcn_data sharding",
}


def test_every_key_has_a_role():
    roles = {item.name.replace("[]", ""): item.role for item in keys.listed(Config)}
    expected = {key: role for role, names in ROLES.items() for key in names.split()}
    assert {key: role for key, role in roles.items() if role != "numbers"} == expected
    groups = {key.partition(".")[0] for key, role in roles.items() if role == "numbers"}
    assert groups == {"dtype", "ema_decay", "model", "input", "text", "loss", "optim", "reference"}


def test_the_recipe_has_the_declared_keys_with_their_defaults():
    c = recipe.base()
    assert json.loads(json.dumps(c.to_dict())) == json.loads(config_lib.to_json(config_lib.Config()))
    unset = {"total_steps": int, "total_epochs": float, "input.prepare": str, "init.image": str}
    for key, kind in {**unset, "input.lanes": int, "model.logit_bias_init": float}.items():
        *groups, leaf = key.split(".")
        part = functools.reduce(lambda group, name: group[name], groups, c)
        assert part[leaf] is None and part.get_type(leaf) is kind
    names = {item.name for item in keys.listed(Config) if "[]" not in item.name}
    groups = {"evals", "loss.terms", "model.image.options", "model.text.options", "input.options"}
    assert names - set(config_lib.flatten(c.to_dict())) <= groups | {"model.decoder"}


@dataclasses.dataclass(frozen=True)
class OfAUser:
    rate: float = keys.key(0.5)


def test_a_digest_counts_what_differs_from_the_defaults_and_all_keys_of_a_users_class():
    assert config_lib.without_defaults(config_lib.Mesh(fsdp=2)) == {"fsdp": 2}
    assert config_lib.without_defaults(OfAUser()) == {"rate": 0.5}


def test_configs_import_little():
    code = (
        "import sys; before = {*sys.modules}\n"
        "from grain_jax.configs import demo; demo.get_config()\n"
        "print(*(m for m in sys.modules if m.startswith('grain_jax')))\n"
        "import importlib\n"
        f"for name in {SHIPPED}: importlib.import_module('grain_jax.configs.' + name).get_config()\n"
        "new = {m.split('.')[0] for m in {*sys.modules} - before}\n"
        "print(*(m for m in new if '-packages' in str(getattr(sys.modules[m], '__file__', ''))))"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True)
    modules, packages = done.stdout.splitlines()
    allowed = "absl contextlib2 etils ml_collections msgspec six typing_extensions yaml _yaml"
    assert {*packages.split()} <= {*allowed.split()}
    assert len(modules.split()) <= 28
