"""The terms of the package within training steps: exact in micro-batches, on every mesh; all that is theirs learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.models import grain
from grain_jax.training import forward, sharding, train_step
from tests import tiny

# Towers alone, since the decoder takes longest to compile; they have regions because terms read them.
TWO = dict(model__decoder=None, model__image__pool="mean", loss__box=0.0)
TWO |= dict(model__image__depth=1, model__text__depth=1, loss__region_description=0.0)
HEAD = dict(prototypes=48, hidden=32, bottleneck=24)
TERMS = {
    "sinkhorn": dict(term="self_distillation", centring="sinkhorn", tile=5, **HEAD),
    "patches": dict(term="masked_patches", tile=7, **HEAD),
}
WITH_CENTRE = {**TERMS, "centre": dict(term="self_distillation", image=True, **HEAD)}
TERMS |= {
    "crops": dict(term="crop_distillation", margin=0.2, min_side=0.15),
    "similar": dict(term="teacher_similarity", temperature=0.05),
    "pooled": dict(term="text_pooled", group=2, heads=4, scale_init=5.0, bias_init=-2.0),
}


def config(mesh=(1, 1, 1), centre=False, names=(), **changes):
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh))
    c = tiny.dictionary(
        **sizes,
        teacher__kind="ema",
        input__views__local=2,
        input__views__size=8,
        model__image__patch_size=4,
        optim__clip_norm=0.0,
        **TWO,
        **changes,
    )
    terms = WITH_CENTRE if centre else TERMS
    c.loss.terms = {name: dict(terms[name], weight=1.0) for name in names or terms}
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
    noise = np.random.default_rng(3)
    noisy = lambda x: np.float32(x + 0.05 * noise.normal(size=x.shape))
    teacher = jax.tree.map(noisy, drawn.params)  # not the student
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
    "centre,mesh,changes",
    [
        pytest.param(False, (2, 2, 2), {"microbatches": 2}, marks=pytest.mark.slow),
        pytest.param(False, (2, 1, 1), {"microbatches": 4}, marks=pytest.mark.slow),
        pytest.param(True, (1, 1, 1), {"microbatches": 4}, marks=pytest.mark.slow),
        pytest.param(True, (8, 1, 1), {}, marks=pytest.mark.slow),
    ],
)
def test_meshes_and_micro_batches_change_nothing(centre, mesh, changes):
    expected, state, gradient = run(centre=centre)
    metrics, other, other_gradient = run(mesh, centre=centre, **changes)
    for a, b in zip(expected, metrics, strict=True):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=3e-5, atol=1e-6, err_msg=name)
    for name, a in grain.flat(gradient).items():
        b = grain.flat(other_gradient)[name]
        assert np.abs(a - b).max() / max(np.abs(a).max(), 1e-2) < 3e-5, name
    assert set(state.term_state) == ({"centre", "patches"} if centre else {"patches"})
    for a, b in zip(jax.tree.leaves(state.term_state), jax.tree.leaves(other.term_state)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_every_parameter_of_a_term_learns():
    metrics, _, gradient = run(centre=False)
    assert {f"loss_{name}" for name in TERMS} <= set(metrics[0])
    assert set(gradient["terms"]) == {"sinkhorn", "patches", "pooled"}
    for name, x in grain.flat(gradient["terms"]).items():
        assert np.abs(x).max() > 0, name


@pytest.mark.slow
def test_terms_learn_beside_a_decoder_a_box_head_and_the_average_of_heads():
    """Each parameter of the terms has a gradient; with teacher.part=heads the teacher has the student's towers."""
    c = tiny.dictionary(**tiny.SHALLOW, teacher__kind="ema", teacher__part="heads")
    c.model.boxes.kind, c.loss.box_description = "prompter", 1.0
    head = dict(prototypes=12, hidden=16, bottleneck=8)
    c.loss.terms.crops = {"term": "crop_distillation", "weight": 1.0}
    c.loss.terms.patches = {"term": "masked_patches", "weight": 1.0, **head}
    c = config_lib.from_dict(c)
    run = forward.Forward(grain.GRAIN(c.model), c)
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32)
    params = jax.tree.map(draw, sharding.unbox(jax.eval_shape(run.init)))
    keys = jax.random.split(jax.random.key(0), c.batch_size)
    teacher, state = {"terms": jax.tree.map(draw, params["terms"])}, run.initial_state()
    given = forward.Given(teacher, sharding.unbox(state), jnp.zeros(()))

    def total(params, given):
        local = run(params, tiny.batch(c), keys, given).local
        return sum(x.loss.sum.sum() for x in local.values()), local["crops"].measures

    gradient, measures = jax.jit(jax.grad(total, has_aux=True))(params, given)
    assert set(measures) == {"map_cosine", "box_cosine"}
    flat = grain.flat(gradient)
    learn = {name for name in flat if name.startswith(("terms/", "box_head", "box_projection"))}
    assert {"terms/crops/map_projection/kernel", "terms/patches/mask_token"} <= learn
    for name in learn:
        assert np.abs(flat[name]).max() > 0, name


def test_prototypes_are_not_stacked_by_micro_batches():
    c = config(microbatches=4, names=["sinkhorn"])
    model = grain.GRAIN(c.model)
    params = sharding.unbox(jax.eval_shape(forward.Forward(model, c).init))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), c.batch_size))
    of = lambda *given: train_step.loss_and_grads(model, c, None, *given)
    text = str(jax.make_jaxpr(of)(params, forward.abstract_batch(c), keys))
    assert "f32[48,24]" in text and "f32[4,48,24]" not in text


def _kinds(c, seed):
    """Stripes of eight kinds, two colours each."""
    rng, size = np.random.default_rng(seed), c.model.image.image_size
    kind = rng.integers(0, 8, c.batch_size)
    colours = np.random.default_rng(99).random((8, 2, 1, 1, 3))[kind]
    y, x = np.mgrid[:size, :size] / size
    stripes = np.stack([np.sin(12 * y) > 0, np.sin(12 * x) > 0])[kind % 2][..., None]
    image = np.where(stripes, colours[:, 0], colours[:, 1]) + rng.normal(0, 0.05, (1, 1, 1, 3))
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


@pytest.mark.slow
def test_no_collapse():
    """After 300 steps each teacher tells kinds of images apart: its mean distribution is wider than a single one."""
    views = dict(brightness=0.1, contrast=0.1, saturation=0.1, min_area=0.3, max_area=0.8)
    changes = {f"input__views__{name}": value for name, value in views.items()}
    c = config(centre=True, total_steps=300, input__views__grey_rate=0.0, **changes)
    program, batch = program_of(c), tiny.batch(c)
    state, metrics = program.init(), {}
    for step in range(300):
        one = batch._replace(image=_kinds(c, step))
        state, metrics = program.step(state, jax.device_put(one, program.batch_sharding))
    for name in WITH_CENTRE:
        entropy, of_one = (float(metrics[f"{name}/{x}"]) for x in ("entropy", "entropy_of_one"))
        assert entropy > 0.5 and of_one < entropy - 0.15, name
        assert 0 < float(metrics[f"{name}/kl"]) < 1, name
