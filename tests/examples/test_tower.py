"""examples/tower: towers of a user in the real model and trainer, on meshes that shard their parameters."""

import json

import jax
import numpy as np
import pytest

from examples.tower import mixer, windows
from grain_jax import config as config_lib
from grain_jax.train import run, sharding, train_step
from tests import tiny

TOWER = f"{mixer.__name__}:Mixer"  # imported, as a stored config asks


def config(steps=3, mesh=(8, 1, 1), **overrides):
    c = tiny.dictionary(
        total_steps=steps,
        checkpoint_every=2,
        model__image__tower=TOWER,
        optim__learning_rate=1e-3,
        **overrides,
    )
    c.model.image.options = dict(token_dim=32)
    c.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh)))
    return config_lib.from_dict(c)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_it_trains_alike_on_all_meshes(tmp_path):
    run.train(config(), tmp_path / "data")
    run.train(config(mesh=(2, 2, 2)), tmp_path / "all")
    got, expected = lines(tmp_path / "all"), lines(tmp_path / "data")
    assert [line["step"] for line in expected] == [1, 2, 3]
    for a, b in zip(got, expected):
        for name in ("loss", "grad_norm/image"):
            assert np.isfinite(b[name]) and b["grad_norm/image"] > 0
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4)


def test_its_parameters_are_sharded():
    c = config(mesh=(2, 2, 2))
    mesh = sharding.make_mesh(c.mesh)
    program = train_step.build(c, mesh, total_steps=3, steps_per_epoch=1.0)
    blocks = program.shardings.params["image"]["blocks"]
    assert tuple(blocks["tokens_in"]["kernel"].spec) == (None, None, "tensor")
    assert tuple(blocks["mlp"]["in"]["kernel"].spec) == (None, "fsdp", "tensor")


def test_a_token_sees_those_just_before_it_in_its_text():
    tower = tiny.dictionary(model__text__tower=f"{windows.__name__}:Windows", model__text__depth=1)
    tower.model.text.options = dict(window=2)
    c = config_lib.from_dict(tower).model.text  # which packs texts
    rng = np.random.default_rng(0)
    tokens, positions = rng.integers(1, 400, (2, 1, 6)), np.array([[[0, 1, 2, 0, 1, 0]]] * 2)
    segments = np.array([[[1, 1, 1, 2, 2, 0]]] * 2)
    module = windows.Windows(c, np.dtype("float32"))
    out, boxed = module.init_with_output(jax.random.key(0), tokens, positions, segments)
    params = sharding.unbox(boxed["params"])
    x, block = np.asarray(params["token_embed"])[tokens[:, 0]], jax.tree.map(lambda x: x[0], params["blocks"])
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c.norm_eps)
    before = np.stack(
        [np.zeros_like(y[:, 0]), *y[:, :2].swapaxes(0, 1), y[:, 0] * 0, y[:, 3], y[:, 0] * 0], axis=1
    )
    ins, outs = block["mlp"]["in"], block["mlp"]["out"]
    hidden = jax.nn.gelu(np.concatenate([y, before], -1) @ ins["kernel"] + ins["bias"], approximate=False)
    np.testing.assert_allclose(out[:, 0], x + hidden @ outs["kernel"] + outs["bias"], atol=1e-6)
    assert np.abs(out[:, 0] - x).max() > 1e-3
