"""self_distillation and masked_patches within training steps."""

import functools

import jax
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.models import grain
from grain_jax.training import sharding, train_step
from tests import tiny

HEAD = dict(prototypes=32, hidden=32, bottleneck=16)
TERMS = {
    "centre": dict(term="self_distillation", image=True, **HEAD),
    "sinkhorn": dict(term="self_distillation", centring="sinkhorn", tile=5, **HEAD),
    "patches": dict(term="masked_patches", tile=7, **HEAD),
}


def config(mesh=(1, 1, 1), terms=TERMS, **changes):
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh))
    c = tiny.dictionary(
        **sizes,
        teacher__kind="ema",
        input__views__local=2,
        input__views__size=8,
        model__image__patch_size=4,
        optim__clip_norm=0.0,
        **changes,
    )
    c.loss.terms = {name: dict(entry, weight=1.0) for name, entry in terms.items()}
    return config_lib.from_dict(c)


def program_of(c, mesh=(1, 1, 1)):
    devices = sharding.make_mesh(c.mesh, jax.devices()[: int(np.prod(mesh))])
    return train_step.build(c, devices, total_steps=c.total_steps, steps_per_epoch=1)


@functools.cache
def run(mesh=(1, 1, 1), **changes):
    """(metrics of two steps, the state after them, the gradient of the first)."""
    c = config(mesh, **changes)
    program = program_of(c, mesh)
    drawn = tiny.state(program)
    teacher = jax.tree.map(lambda x: 0.9 * x, drawn.params)
    state = jax.device_put(drawn._replace(teacher=teacher), program.shardings)
    batch = jax.device_put(tiny.batch(c), program.batch_sharding)
    metrics, gradient = [], None
    for _ in range(2):
        state, found = program.step(state, batch)
        metrics.append(jax.tree.map(float, found))
        if gradient is None:
            of = lambda m: np.asarray(m) / (1 - c.optim.b1)
            gradient = jax.tree.map(of, state.opt_state[1].mu)
    return metrics, jax.device_get(state), gradient


@pytest.mark.parametrize(
    "mesh,changes",
    [
        ((1, 1, 1), {"microbatches": 2}),
        ((1, 1, 1), {"microbatches": 4}),
        ((2, 1, 1), {}),
        ((2, 2, 2), {"microbatches": 2}),
    ],
)
def test_meshes_and_micro_batches_change_nothing(mesh, changes):
    expected, state, gradient = run()
    metrics, other, other_gradient = run(mesh, **changes)
    for a, b in zip(expected, metrics, strict=True):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=2e-5, err_msg=name)
    for name, a in grain.flat(gradient).items():
        b = grain.flat(other_gradient)[name]
        assert np.abs(a - b).max() / max(np.abs(a).max(), 1e-2) < 2e-5, name
    assert set(state.term_state) == {"centre", "patches"}
    for a, b in zip(jax.tree.leaves(state.term_state), jax.tree.leaves(other.term_state)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_every_parameter_of_a_term_learns():
    _, _, gradient = run()
    for name, x in grain.flat(gradient["terms"]).items():
        assert np.abs(x).max() > 0, name
