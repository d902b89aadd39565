"""Configs: every shipped one resolves; a wrong key anywhere is an error with a suggestion."""

import dataclasses
import functools
import importlib
import json
import subprocess
import sys

import pytest

from grain_jax import config as config_lib
from grain_jax.config import evals, listing, loading, recipe
from grain_jax.core import errors
from grain_jax.train.arguments import Train
from tests import tiny
from tests.paths import ROOT

SHIPPED = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "eval"])
def test_shipped_configs_resolve(name):
    config = config_lib.from_dict(importlib.import_module(f"grain_jax.configs.{name}").get_config())
    assert config_lib.from_dict(json.loads(config_lib.to_json(config))) == config


def test_reference_config_restores_what_the_spec_lists():
    c = config_lib.from_dict(importlib.import_module("grain_jax.configs.reference").get_config())
    assert not c.text.packing and c.loss.group_size == 128 and not c.loss.mask_duplicates
    assert c.loss.box == 1.5 and c.model.image.block_init == "torch" and c.reference


# Keys that are set, and what the fault says.
FAULTS = [
    ({"optim.learning_rte": 1.0}, "optim.learning_rte: no such key; did you mean optim.learning_rate?"),
    ({"loss.zzz": 1}, "loss.zzz: no such key; there are: loss.image_caption,"),
    ({"input.datasets": [{"name": "a", "data_dir": "x"}]}, "input.datasets[0].weight: missing; it has no d"),
    ({"batch_size": "x"}, "batch_size: got 'x', expected int"),
    ({"total_epochs": 1.0}, "total_steps, total_epochs: exactly one must be set"),
    ({"input.lanes": 3}, "input.lanes: got 3, must divide batch_size 16"),
    ({"model.image.patch_size": 5}, "model.image.image_size: got 16, expected a multiple of"),
    (
        {"loss.match_l1": 0.0, "loss.match_giou": 0.0},
        "loss.match_l1, loss.match_giou, loss.match_description: got 0 for all",
    ),
    ({"input.captions_per_image": 4}, "input.captions_per_image: got 4, expected 1 to 3"),
    (
        {"input.captions_per_image": 2, "input.descriptions_in_captions": 8},
        "input.descriptions_in_captions: got 8 with input.captions_per_image=2, expected 0",
    ),
    (
        {"loss.box_description": 1.0},
        "loss.box_description: got 1.0 with model.boxes.kind=none and input.max_regions=5; expected a box head",
    ),
    (
        {"model.boxes.kind": "roi_align"},
        "loss.box_description: got 0 with model.boxes.kind=roi_align, so that nothing trains the box head",
    ),
    (
        {"loss.hard_negative": 0.5},
        "loss.hard_negative: got 0.5 with input.negatives_per_region=0, expected negatives",
    ),
    (
        {"model.decoder": None, "model.image.pool": "class", "input.negatives_per_region": 2}
        | {"loss.hard_negative": 1.0, "loss.image_description": 1.0},
        "loss.hard_negative: got 1 without model.decoder and model.boxes, expected one of them",
    ),
    (
        {"input.negatives_per_region": 2, "input.max_regions": 0},
        "input.negatives_per_region: got 2, expected 0: with input.max_regions=0 no region has",
    ),
    (
        {"input.text_length": 16, "model.text.causal": False, "text.packing": False},
        "input.text_length: got 16 with a text tower that sees its padding",
    ),
    ({"input.flip_rate": 7.0}, "input.flip_rate: got 7.0, expected 0 to 1"),
    ({"optim.learning_rate": float("nan")}, "optim.learning_rate: got nan, expected a finite number"),
    ({"total_steps": 2**31}, "total_steps: got 2147483648, expected 1 to 2147483647"),
    ({"evals": None}, "evals: got None, expected a group of keys"),
]  # fmt: skip


def _changed(changes):
    """tests/tiny.py's config as a dict, with values at these keys."""
    values = tiny.dictionary().to_dict()
    for key, value in changes.items():
        *groups, leaf = key.split(".")
        functools.reduce(dict.__getitem__, groups, values)[leaf] = value
    return values


@pytest.mark.parametrize("changes,message", FAULTS)
def test_faults_are_named(changes, message):
    with pytest.raises(config_lib.ConfigError) as caught:
        config_lib.from_dict(_changed(changes))
    assert message in str(caught.value)


def test_all_faults_of_a_config_are_reported_at_once():
    with pytest.raises(config_lib.ConfigError) as caught:
        config_lib.from_dict(_changed({"loss.bx": 1.0, "seed": None}))
    assert len(str(caught.value).splitlines()) == 2


def test_every_key_is_read():
    """A key that nothing reads is a switch that does nothing."""
    declared = ROOT / "grain_jax" / "config" / "fields.py"
    code = "\n".join(p.read_text() for p in (ROOT / "grain_jax").rglob("*.py") if p != declared)
    keys = [*listing.keys(), *listing.keys(config_lib.Evaluator)]
    assert not [key.name for key in keys if f".{key.name.rpartition('.')[2]}" not in code]


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
    found = {key.name.replace("[]", ""): key.role for key in listing.keys()}
    listed = {key: role for role, keys in ROLES.items() for key in keys.split()}
    assert {key: role for key, role in found.items() if role != "numbers"} == listed
    groups = {key.partition(".")[0] for key, role in found.items() if role == "numbers"}
    assert groups == {"dtype", "ema_decay", "model", "input", "text", "loss", "optim", "reference"}


def test_the_recipe_is_the_defaults_of_the_fields():
    c = recipe.base()
    assert json.loads(json.dumps(c.to_dict())) == json.loads(
        config_lib.to_json(config_lib.Config())
    )
    unset = {"total_steps": int, "total_epochs": float, "input.prepare": str, "init.image": str}
    for key, kind in {**unset, "input.lanes": int, "model.logit_bias_init": float}.items():
        *groups, leaf = key.split(".")
        part = c
        for group in groups:
            part = part[group]
        assert part[leaf] is None and part.get_type(leaf) is kind


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
    own, packages = done.stdout.splitlines()
    assert {*packages.split()} <= {*"absl contextlib2 etils ml_collections six yaml _yaml".split()}
    assert len(own.split()) <= 24


# A folder of someone's own: a config, the file of its folder that it imports, and a sweep that does so too.
OWN = {
    "gemeinsam.py": "BATCH = 24\n",
    "mine.py": """
import gemeinsam
from grain_jax.config.recipe import base

def get_config(size="tiny"):
    c = base(size)
    c.total_steps, c.optim.warmup_steps = 5, 1
    c.batch_size = gemeinsam.BATCH
    c.input.lanes, c.text.pack_group = 1, 24
    return c
""",
    "old.py": "from configs.common import base\n",
    "fails.py": "def get_config(size=0):\n    return 1 / size\n",
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Such a folder, below the working directory."""
    folder = tmp_path / "meine Bilder, größer"
    folder.mkdir()
    for name, text in OWN.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    yield folder
    sys.modules.pop("gemeinsam", None)


def test_a_config_anywhere_on_the_disk_works(own, monkeypatch):
    for path, cwd, width in (
        ("mine.py", own, 96),
        (f"../{own.name}/mine.py:S/16", own, 384),
        (f"{own.name}/mine.py", own.parent, 96),
        (str(own / "mine.py:B/16"), "/", 768),
    ):
        monkeypatch.chdir(cwd)
        c = loading.load(path)
        assert (c.batch_size, c.model.image.width) == (24, width)


@pytest.mark.parametrize(
    "path,message",
    [
        ("old.py", "old.py:1: ModuleNotFoundError: No module named 'configs'; what configs share"),
        ("fails.py", "fails.py:2: ZeroDivisionError: division by zero"),
        ("gemeinsam.py", "gemeinsam.py: module 'config_config' has no attribute 'get_config'"),
        ("mine.py:L/15", "mine.py:6: ValueError: model size: got 'L/15', expected one of tiny, S/"),
        ("none.py", "--config: no such file none.py, and no config of the package has that name; "),
    ],
)
def test_a_fault_in_a_config_file_is_one_line_with_its_place(own, monkeypatch, path, message):
    monkeypatch.chdir(own)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x not in ("", ".", str(ROOT))])
    with pytest.raises(errors.UserError) as caught:
        loading.load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


DEMO = ("--workdir=x", "--config=configs/demo.py")


def _parsed(*arguments):
    """The Config of a command line of the trainer."""
    args = Train.parse(arguments)
    return loading.load(args.config, args.overrides)


def test_the_command_line_wins_over_the_file_in_either_or_pairs():
    given = ["--workdir=x", "--config=configs/grain_vitb16_cc12m.py", "--config.total_steps=100"]
    c = _parsed(*given, "--config.optim.warmup_steps=5")
    assert (c.total_steps, c.total_epochs) == (100, None)
    assert (c.optim.warmup_steps, c.optim.warmup_epochs) == (5, None)
    assert _parsed(*given, "--config.total_epochs=None").total_steps == 100
    twice = "--config.total_epochs=None", "--config.total_epochs=3"
    assert _parsed(*given[:2], *twice).total_epochs == 3
    with pytest.raises(
        errors.UserError, match="total_steps, total_epochs: exactly one must be set"
    ):
        _parsed(*given[:2], "--config.total_epochs=None")


@pytest.mark.parametrize(
    "given, left",
    [
        (["--config.evals.seen=None"], ["grounding", "maps", "parts", "retrieval", "unseen"]),
        (["--config.evals=None"], []),
    ],
)
def test_flags_take_evaluators_out(given, left):
    c = _parsed(*DEMO, *given)
    assert list(c.evals) == left
    assert "unseen" not in left or c.evals["unseen"].names == (len(given) == 3)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--config.evals.sen=None"], "--config.evals.sen: no such key; did you mean evals.seen?"),
        (
            ["--config.evals.seen=0"],
            "--config.evals.seen: got '0', expected None, which takes the evaluator out, or a key of one,"
            " such as --config.evals.seen.images=FOLDER",
        ),
        (
            [
                "--config.evals.seen=None",
                "--config.checkpoint_best_metric=eval/seen/alpha_1.0/top1",
            ],
            "checkpoint_best_metric: got 'eval/seen', expected one of eval/grounding, eval/maps,"
            " eval/parts, eval/retrieval, eval/unseen",
        ),
        (["--config=configs/demo.py:x"], "argument"),
    ],
)
def test_wrong_usage_is_one_line(given, message):
    with pytest.raises(errors.UserError) as caught:
        _parsed(*DEMO, *given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["config", "workdir"])
def test_flags_that_are_missing(flag):
    with pytest.raises(errors.UserError, match=rf"--{flag} \S+: missing; "):
        _parsed(*(given for given in DEMO if f"--{flag}" not in given))


def test_the_list_of_keys_is_that_of_the_recipe_and_says_what_each_is():
    keys = {key.name: key for key in listing.keys()}
    given = recipe.base()
    flat = config_lib.flatten(given.to_dict())
    groups = {"evals", "loss.terms", "model.image.options", "model.text.options", "input.options"}
    assert set(flat) <= set(keys)
    assert {name for name in set(keys) - set(flat) if "[]" not in name} <= groups | {
        "model.decoder"
    }
    assert {name: key.role for name, key in keys.items()}["model.decoder.queries"] == "numbers"
    evaluators = [
        key for kind in evals.NAMED for key in listing.keys(evals.find(kind), f"evals.{kind}")
    ]
    assert not [key.name for key in [*keys.values(), *evaluators] if not key.comment]


@pytest.mark.parametrize(
    "line",
    [
        ("batch_size", "int", "2048", "at least 1", "order", "images a step, over all devices"),
        (
            "model.image.activation",
            "str",
            "'gelu'",
            "one of gelu, gelu_tanh, quick_gelu, relu, silu",
        )
        + ("numbers", 'of the MLP; "gelu" is exact'),
        ("input.datasets[].weight", "float", "", "", "order")
        + ("more than 0; the share is weight / sum of all weights",),
        ("model.decoder", "group or None", "the keys below", "", "numbers")
        + ("None: two towers, without regions",),
    ],
)
def test_a_key_in_words(line):
    assert line in list(listing.keys())


def test_a_comment_above_and_one_beside_are_one_line():
    source = "a = 1  # of another\n# first\n# second\nb = (  # third\n    2  # fourth\n)\n"
    assert listing.comment_at(source, 4, 6) == "first second third fourth"
    assert listing.comment_at(source, 1, 1) == "of another"
    assert listing.comment_at("c = 1\n", 1, 1) == ""
