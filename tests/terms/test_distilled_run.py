"""crop_distillation, teacher_similarity and text_pooled in the training step: exact in micro-batches, on every mesh."""

import functools
import math

import jax
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.models import grain
from grain_jax.training import sharding, train_step
from tests import tiny

TERMS = {
    "crop_distillation": {"map": True, "margin": 0.2, "min_side": 0.15},
    "teacher_similarity": {"temperature": 0.05},
    "text_pooled": {"group": 2, "heads": 4, "scale_init": 5.0, "bias_init": -2.0},
}
# Of two towers, which compile quickly; they have regions because terms read them.
TOWERS = dict(
    model__decoder=None,
    model__image__depth=1,
    model__image__pool="mean",
    model__text__depth=1,
    loss__box=0.0,
    loss__region_description=0.0,
)


@functools.cache
def run(mesh=(1, 1, 1), **changes):
    """(metrics of two steps, the gradient of the first)."""
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh))
    c = tiny.dictionary(**TOWERS, **sizes, **changes, teacher__kind="ema", teacher__decay=0.5)
    c.optim.clip_norm = 0.0
    for name, options in TERMS.items():
        c.loss.terms[name] = {"term": name, "weight": 0.5, **options}
    c = config_lib.from_dict(c)
    devices = sharding.make_mesh(c.mesh, jax.devices()[: math.prod(mesh)])
    program = train_step.build(c, devices, total_steps=10, steps_per_epoch=1)
    state = tiny.state(program)
    # A teacher that is not the student.
    rng = np.random.default_rng(3)
    noisy = lambda x: np.float32(x + 0.05 * rng.normal(size=x.shape))
    state = state._replace(teacher=jax.tree.map(noisy, state.params))
    state = jax.device_put(state, program.shardings)
    batch = jax.device_put(tiny.batch(c), program.batch_sharding)
    state, first = program.step(state, batch)
    gradient = jax.tree.map(lambda m: np.asarray(m) / (1 - c.optim.b1), state.opt_state[1].mu)
    _, second = program.step(state, batch)
    return [jax.tree.map(float, x) for x in (first, second)], grain.flat(gradient)


@pytest.mark.parametrize(
    "mesh,changes",
    [
        ((2, 2, 2), {"microbatches": 2}),
        pytest.param((2, 1, 1), {"microbatches": 4}, marks=pytest.mark.slow),
    ],
)
def test_meshes_and_micro_batches_change_nothing(mesh, changes):
    expected, gradient = run()
    metrics, other = run(mesh, **changes)
    for a, b in zip(expected, metrics, strict=True):
        assert all(f"loss_{name}" in a for name in TERMS)
        assert {"crop_distillation/map_cosine", "text_pooled/accuracy"} <= set(a)
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=3e-5, atol=1e-6, err_msg=name)
    for name, a in gradient.items():
        assert np.abs(a - other[name]).max() <= 3e-5 * max(np.abs(a).max(), 1e-2), name


def test_every_parameter_of_the_terms_learns():
    gradient = run()[1]
    own = {name: x for name, x in gradient.items() if name.startswith("terms/")}
    assert {name.split("/")[1] for name in own} == {"text_pooled"}
    for name, x in own.items():
        assert np.abs(x).max() > 0, name
