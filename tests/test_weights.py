"""Weights of loss terms that change in a run: in config files, on the command line, in sweeps, and their values."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax import losses
from grain_jax.cli import config_file, config_keys
from grain_jax.config import recipe
from grain_jax.core import errors
from grain_jax.launch import sweep_runs, sweep_table
from grain_jax.training import flops
from tests import tiny
from tests.losses.test_losses import _outputs

SIGLIP = {"start": 0.0, "end": 1.0, "from": 0.8, "to": 0.8}
TERM = {"term": "box", "weight": {"end": 0.5, "from": 0.2, "to": 0.6}}


@pytest.mark.parametrize(
    "given,expected",
    [
        ({"end": 1, "from": 0.8}, SIGLIP),
        ({"start": 1, "to": 0.5}, {"start": 1.0, "end": 0.0, "from": 0.0, "to": 0.5}),
        ({"end": 2, "to": 1}, {"start": 0.0, "end": 2.0, "from": 0.0, "to": 1.0}),
        (SIGLIP, SIGLIP),
        (2, 2.0),
    ],
)
def test_missing_keys_have_defaults(given, expected):
    c = tiny.config(loss__box=given, loss__terms__x={"term": "box", "weight": given})
    assert c.loss.box == c.loss.terms["x"]["weight"] == expected
    assert type(c.loss.box) is (float if given == 2 else config_lib.Schedule)
    text = config_lib.to_json(c)
    assert config_lib.from_dict(json.loads(text)) == c
    if given == 2:  # a stored config has the digest that it was stored with
        assert type(json.loads(text)["loss"]["terms"]["x"]["weight"]) is int


@pytest.mark.parametrize(
    "given,fault",
    [
        ({"strat": 1, "from": 0.5}, "loss.box.strat: no such key; did you mean loss.box.start?"),
        ({"end": 1}, "loss.box: got {'end': 1}, expected from or to: the shares of the run where"),
        ({"end": 1, "from": 0.8, "to": 0.5}, "got 0.8, 0.5, expected 0 <= from <= to <= 1"),
        ({"end": 1, "from": 0, "to": 80}, "got 0, 80, expected 0 <= from <= to <= 1"),
        ({"end": "1", "from": 0.5}, "loss.box.end: got '1', expected a finite number"),
        ({"end": float("nan"), "from": 0.5}, "loss.box.end: got nan, expected a finite number"),
        ("much", 'loss.box: got \'much\', expected a finite number, or {"start": 0, "end": 1,'),
        (None, "loss.box: got None, expected a finite number, or"),
    ],
)
def test_a_fault_of_a_weight_is_one_line(given, fault):
    for key in ("box", "terms.x.weight"):
        c = tiny.dictionary()
        c.loss.terms.x = {"term": "box", "weight": 1.0}
        with c.ignore_type():
            c.update_from_flattened_dict({f"loss.{key}": given})
        with pytest.raises(config_lib.ConfigError) as error:
            config_lib.from_dict(c)
        line = str(error.value)
        assert fault.replace("loss.box", f"loss.{key}") in line and "\n" not in line


def test_a_config_file_takes_numbers_and_schedules():
    c = recipe.base("tiny")
    c.loss.box = {"end": 1, "from": 0.8}
    c.loss.box = 0.5
    c.loss.image_caption = {"start": 1, "end": 0.5, "to": 1}
    c.update({"loss": {"region_description": {"start": 1, "from": 0.5}}})
    c.update_from_flattened_dict({"total_steps": 10, "optim.warmup_steps": 1})
    loss = config_lib.from_dict(c).loss
    assert loss.box == 0.5 and set(loss.schedules) == {"image_caption", "region_description"}
    assert loss.image_caption == {"start": 1, "end": 0.5, "from": 0, "to": 1}


@pytest.mark.parametrize(
    "words,expected",
    [
        (["box=0.25"], 0.25),
        (['box={"start": 0, "end": 1, "from": .8, "to": .8}'], SIGLIP),
        (["box.end=1", "box.from=.8"], SIGLIP),
        (['box={"end": 3, "from": 0.8}', "box.end=1"], SIGLIP),
        (["box.end=3", "box.from=0.5", "box=1e-2"], 0.01),
    ],
)
def test_the_command_line_takes_numbers_schedules_and_their_keys(words, expected):
    loss = config_file.load("demo", [f"--config.loss.{word}" for word in words]).loss
    assert loss.box == expected
    of_x = [f"--config.loss.terms.x.weight{word.removeprefix('box')}" for word in words]
    found = config_file.load("demo", ["--config.loss.terms.x.term=box", *of_x]).loss.terms["x"]
    assert found == {"term": "box", "weight": expected}


def test_keys_of_a_schedule_in_a_file_change_one_by_one(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from grain_jax.configs import demo\n"
        "def get_config():\n"
        "    c = demo.get_config()\n"
        "    c.loss.box = {'start': 0, 'end': 1, 'from': 0.2, 'to': 0.4}\n"
        "    c.loss.terms.x = {'term': 'box', 'weight': 0.1}\n"
        "    return c\n"
    )
    load = lambda *words: config_file.load(str(file), [f"--config.loss.{x}" for x in words]).loss
    assert load("box.to=0.9").box == {"start": 0, "end": 1, "from": 0.2, "to": 0.9}
    assert load("box=2").box == 2.0
    changed = load("terms.x.weight.end=2", "terms.x.weight.from=0.5").terms["x"]["weight"]
    assert changed == {"start": 0, "end": 2, "from": 0.5, "to": 0.5}
    assert load("terms.x.weight=3").terms["x"]["weight"] == 3.0
    with pytest.raises(
        errors.UserError, match=r"loss.box.form: no such key; did you mean loss.box.from"
    ):
        load("box.form=0.5")
    with pytest.raises(errors.UserError, match=r"loss.boxx: no such key; did you mean loss.box\?"):
        load("boxx=1")
    shown = config_keys.show("loss.box", str(file), [])
    assert "loss.box = {'end': 1, 'from': 0.2, 'start': 0, 'to': 0.4}" in shown
    assert "(float or schedule; default 1)" in shown


def test_a_sweep_over_schedules(tmp_path):
    points = [{"loss.box": {"end": 1, "from": share}} for share in (0.5, 0.8)]
    points += [{"loss.box": 0.0}, {"loss.box.end": 1.0, "loss.box.from": 0.25}]
    runs = sweep_runs.make_runs("demo", [], points, tmp_path)
    assert [run.config.loss.box for run in runs[2:]] == [0.0, SIGLIP | {"from": 0.25, "to": 0.25}]
    assert runs[0].name == "box=end-1-from-0.5"
    assert runs[1].swept == {"loss.box": "{start: 0, end: 1, from: 0.8, to: 0.8}"}
    rows = sweep_table.read(runs, [False] * 4)
    assert "from: 0.5" in sweep_table.text(rows, "loss")
    for run in runs[:2]:
        run.folder.mkdir()
        (run.folder / "config.json").write_text(config_lib.to_json(runs[0].config))
    sweep_runs.check_folders(runs[:1])
    with pytest.raises(
        errors.UserError, match=r"trained with loss.box = \{'start': 0.0, 'end': 1.0, 'from': 0.5"
    ):
        sweep_runs.check_folders(runs)
    (runs[2].folder).mkdir()
    (runs[2].folder / "config.json").write_text(config_lib.to_json(runs[0].config))
    with pytest.raises(errors.UserError, match=r"loss.box = .*, now it is 0.0"):
        sweep_runs.check_folders(runs[2:3])


def test_a_schedule_makes_another_run():
    plain, changed = tiny.config(), tiny.config(loss__box=SIGLIP)
    told = config_lib.select(changed, {"numbers"})
    assert told["loss.box"] == SIGLIP and config_lib.select(plain, {"numbers"})["loss.box"] == 1.0
    assert config_lib.without_defaults(changed)["loss.box"] == SIGLIP
    assert "loss.box" not in config_lib.without_defaults(plain)


@pytest.mark.parametrize(
    "given,total,steps",
    [
        (SIGLIP, 10, range(8, 10)),
        ({"end": 1, "from": 0.07}, 100, range(7, 100)),  # 0.07 * 100 > 7 in floats
        ({"end": 1, "from": 0.2, "to": 0.6}, 10, range(3, 10)),  # at step 2 it is still 0
        ({"end": 1, "from": 0.25, "to": 0.6}, 10, range(3, 10)),
        ({"end": 1, "from": 0.21, "to": 0.29}, 10, range(3, 10)),
        ({"start": 1, "from": 0.2, "to": 0.6}, 10, range(6)),
        ({"start": 1, "end": 2, "to": 1}, 10, range(10)),
        ({"end": 1, "from": 1}, 10, range(0)),  # no step has that share
        ({"end": 0, "from": 0.5}, 10, range(0)),
    ],
)
def test_the_steps_in_which_a_weight_is_not_0(given, total, steps):
    c = tiny.config(loss__box=given)
    assert [*c.loss.box.on(total)] == [*steps]
    of_step = jax.jit(lambda step: losses.weights_at(c.loss, step, total)["box"])
    assert [step for step in range(total) if of_step(jnp.int32(step))] == [*steps]


def test_weights_of_a_step_are_those_of_the_definition():
    schedules = {
        "box": {"start": 0.5, "end": 2, "from": 0.21, "to": 0.77},
        "image_caption": {"start": 1, "end": -1, "from": 0, "to": 1},
        "region_description": SIGLIP,
    }
    c = tiny.config(
        **{f"loss__{name}": one for name, one in schedules.items()}, loss__terms__x=TERM
    )
    for total in (10, 37):
        of_step = jax.jit(lambda step, total=total: losses.weights_at(c.loss, step, total))
        found = [of_step(jnp.int32(step)) for step in range(total)]
        for name, one in {**schedules, "x": {"start": 0} | TERM["weight"]}.items():
            share = np.arange(total) / total
            expected = np.interp(share, [one["from"], one["to"]], [one["start"], one["end"]])
            expected[share >= one["to"]] = one["end"]  # a step, too
            got = np.array([weights[name] for weights in found])
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
            weight = c.loss.schedules[name]
            begin, until = weight.changes(total)
            assert (got[:begin] == one["start"]).all() and (got[until:] == one["end"]).all()


def test_the_total_takes_the_weights_of_the_step_and_leaves_out_terms_without():
    """Values and gradients are those of the same weights as numbers."""
    numbers = tiny.config(loss__image_description=0.25, loss__box=0.0)
    c = tiny.config(loss__image_description=SIGLIP, loss__box=SIGLIP)
    batch, outputs = tiny.batch(c), _outputs(c)

    @jax.jit
    def of(image_embed, weights):
        both = []
        for one, given in ((numbers, {}), (c, weights)):

            def total(x, one=one, given=given):
                moved = outputs._replace(image_embed=x)
                found = losses.total_loss(moved, batch, one.loss, weights=given)
                return found.total, found

            both.append(jax.value_and_grad(total, has_aux=True)(image_embed))
        return both

    weights = {"image_description": jnp.float32(0.25), "box": jnp.float32(0.0)}
    ((expected, by_number), gradient), ((value, found), other) = of(outputs.image_embed, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(other, gradient, rtol=1e-5, atol=1e-7)
    assert set(found.terms) == set(by_number.terms) and np.abs(gradient).max() > 1e-3
    off = jax.eval_shape(lambda o: losses.total_loss(o, batch, c.loss), outputs)
    assert set(off.terms) == {"image_caption", "region_description"}
    assert "matched_iou" in found.measures and "matched_iou" not in off.measures


def test_a_term_with_a_schedule_is_on_where_it_is_ever_not_0():
    names = lambda c: {term.name for term, _ in losses.terms_of(c.loss)}
    assert "image_description" in names(tiny.config(loss__image_description=SIGLIP))
    never = tiny.config(loss__image_description=SIGLIP | {"end": 0})
    assert "image_description" not in names(never)
    head = dict(model__boxes__kind="roi_align", loss__box_description=SIGLIP)
    assert flops.of_losses(tiny.config(**head)) > flops.of_losses(tiny.config())
    fault = r"loss.hard_negative: got \{start: 0, end: 1, from: 0.8, to: 0.8\} with input.negatives"
    with pytest.raises(config_lib.ConfigError, match=fault):
        tiny.config(loss__hard_negative=SIGLIP)
    with pytest.raises(
        config_lib.ConfigError, match=r"loss.box_description: got \{start: 0, end: 1"
    ):
        tiny.config(loss__box_description=SIGLIP)
