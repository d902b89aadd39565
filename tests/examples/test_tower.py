"""examples/tower: an image tower of a user through the real trainer, on meshes that shard its parameters."""

import json

import numpy as np
import pytest

from examples.tower import mixer
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
