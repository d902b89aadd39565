"""A run with LoRA: on 8 devices as on one, resumed bit for bit, loaded, merged."""

import json

import jax
import numpy as np
import pytest

import grain_jax
from grain_jax.checkpoint import files, saved_model
from grain_jax.convert.__main__ import main
from grain_jax.core import low_rank
from grain_jax.models import grain
from grain_jax.train import run, sharding, train_step
from tests import tiny

RUN = dict(
    optim__lora__rank=4,
    optim__lora__alpha=6.0,
    ema_decay=0.9,
    total_steps=4,
    checkpoint_every=2,
    checkpoint_keep=4,
    optim__learning_rate=0.02,
)
# Two towers compile sooner.
TWO = dict(model__decoder=None, model__image__pool="mean", input__max_regions=0)
EIGHT = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, microbatches=2, remat="qkv")


def _after(devices, **changes):
    """(the state of step 0, that after a step, metrics) on so many devices."""
    c = tiny.small(**RUN, **changes)
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:devices])
    program = train_step.build(c, mesh, total_steps=4, steps_per_epoch=1)
    before = tiny.state(program)
    batch = jax.device_put(tiny.batch(c), program.batch_sharding)
    step = program.step.lower(program.state, program.batch).compile()
    state, metrics = step(jax.device_put(before, program.shardings), batch)
    return before, jax.device_get(state), jax.tree.map(float, metrics)


@pytest.mark.parametrize(
    "model", [TWO, pytest.param({}, marks=pytest.mark.slow)], ids=["two towers", "decoder"]
)
def test_eight_devices_are_one(model):
    before, one, metrics = _after(1, **model)
    _, eight, others = _after(8, **model, **EIGHT)
    for name in metrics:
        np.testing.assert_allclose(others[name], metrics[name], rtol=2e-5, err_msg=name)
    trained = 0
    for tree in ("params", "ema_params"):
        start, a, b = (grain.flat(getattr(state, tree)) for state in (before, one, eight))
        for name in a:
            frozen = ("image/", "text") if model is not TWO else ("image", "text")
            if name.startswith(frozen) and "lora_" not in name:
                np.testing.assert_array_equal(a[name], start[name], err_msg=name)
                np.testing.assert_array_equal(b[name], start[name], err_msg=name)
            else:
                trained += "lora_" in name and not np.array_equal(a[name], start[name])
                np.testing.assert_allclose(a[name], b[name], atol=3e-4, err_msg=name)
    assert trained == 2 * 24
    moments = {name for name in grain.flat(one.opt_state) if "/image/" in name or "/text" in name}
    assert len(moments) == 2 * 24 and all("lora_" in name for name in moments)
    for name in moments:
        a, b = grain.flat(one.opt_state)[name], grain.flat(eight.opt_state)[name]
        assert np.abs(a - b).max() / max(np.abs(a).max(), 1e-3) < 4e-5, name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    run.train(tiny.small(**RUN, **TWO, **EIGHT), workdir)
    return workdir


def test_it_does_not_go_on_with_another_scale(finished):
    told = "optim.lora.alpha: the run in this workdir has 6, got 8; .* use another --workdir"
    with pytest.raises(files.CheckpointError, match=told):
        run.train(tiny.small(**RUN | dict(optim__lora__alpha=8.0), **TWO, **EIGHT), finished)


def test_it_is_loaded_and_merged_as_it_was_trained(finished, tmp_path, capsys):
    stored = saved_model.load_stored(finished)
    assert len(list(low_rank.maps_in(stored.params))) == 12
    predictor = grain_jax.load(finished)
    names = grain.parameter_shapes(predictor.model)
    assert grain.flat(predictor.params).keys() == names.keys()
    base = grain.flat(stored.params)["image/blocks/mlp/in/kernel"]
    a, b = (grain.flat(stored.params)[f"image/blocks/mlp/in/lora_{x}"] for x in "ab")
    expected = base.astype(np.float64) + 1.5 * a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(
        predictor.params["image"]["blocks"]["mlp"]["in"]["kernel"], expected, rtol=1e-5, atol=1e-6
    )
    assert np.abs(1.5 * a @ b).max() > 1e-4
    out = tmp_path / "merged"
    assert main(["merge", "--checkpoint", str(finished), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "12 maps, of all layers each; rank 4, alpha 6" in said
    assert said.rstrip().endswith("parity: PROVEN")
    for name, x in grain.flat(saved_model.load_model(out)[1]).items():
        np.testing.assert_array_equal(x, grain.flat(predictor.params)[name], err_msg=name)
    assert json.loads((out / "config.json").read_text())["parity"] == "PROVEN"
    assert main(["merge", "--checkpoint", str(out), "--output", str(tmp_path / "again")]) == 2
    assert "has no factors of LoRA" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
