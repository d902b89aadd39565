"""Local loss terms: exact under micro-batches and on every mesh, with parameters and state."""

import dataclasses
import functools
import zlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.losses import local
from grain_jax.models import grain, layers
from grain_jax.train import flops, forward, sharding, train_step
from tests import tiny


@dataclasses.dataclass(frozen=True)
class Options:
    """Keys of the term."""

    factor: float = 2.0


class Smooth(local.LocalTerm):
    """Patches through a map of its own, against their neighbours; a centre in its state."""

    Options: ClassVar[type] = Options

    def setup(self):
        self.map = layers.dense(
            4, ("width",), ("vector",), dtype=jnp.float32, kernel_init=layers.normal(0.2)
        )

    def initial_state(self, params):
        return {"centre": jnp.zeros(4)}

    def update(self, state, statistics, params):
        return {"centre": 0.5 * state["centre"] + 0.5 * statistics["sum"] / statistics["count"]}

    def __call__(self, seen):
        patches = self.map(seen.tokens[:, seen.leading :].astype(jnp.float32))
        noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(seen.keys)
        centred = patches - seen.state["centre"] + 0.1 * noise[:, None]
        other = seen.apply("image_tokens", seen.batch.image[:, ::-1])
        loss = self.options.factor * jnp.square(centred).sum((1, 2)) + other.mean((1, 2))
        of_groups = seen.text_features.mean((1, 2, 3))
        loss = loss + jnp.repeat(of_groups, len(loss) // len(of_groups))
        count = 1 + seen.batch.caption_id[:, 0] % 3  # ints, as the sum of a mask is
        return local.LocalOutput(
            local.PerImage(loss * count, count),
            {"norm": local.PerImage(jnp.abs(patches).mean((1, 2)), jnp.ones(len(loss), bool))},
            statistics={"sum": patches.mean(1).sum(0), "count": jnp.int32(len(loss))},
        )


class Average(Smooth):
    """The map of an average of all parameters, its own too, on the tokens of the average for a mirrored image."""

    def initial_state(self, params):
        return {"average": jax.tree.map(jnp.copy, params), "steps": jnp.zeros(())}

    def update(self, state, statistics, params):
        moved = lambda old, new: 0.75 * old + 0.25 * new
        average = jax.tree.map(moved, state["average"], params)
        return {"average": average, "steps": state["steps"] + 1}

    def __call__(self, seen):
        average = seen.state["average"]
        mirrored = seen.batch.image[:, :, ::-1]
        target = seen.apply("image_tokens", mirrored, params=average.model)[:, 0]
        if not self.is_initializing():
            own = average.term["map"]
            target = target @ own["kernel"] + own["bias"]
        else:
            target = self.map(target)
        loss = jnp.square(self.map(seen.tokens[:, 0]) - target).sum(-1)
        return local.LocalOutput(local.PerImage(loss, jnp.ones(len(loss))))


# Towers alone: the decoder takes longest to compile.
TWO = dict(model__decoder=None, model__image__pool="mean", input__max_regions=0)
TWO |= dict(model__image__depth=1, model__text__depth=1)


class Bare(local.LocalTerm):
    """A term without parameters."""

    def __call__(self, seen):
        loss = seen.outputs.image_embed[:, 0]
        return local.LocalOutput(local.PerImage(loss, jnp.ones(len(loss))))


def config(mesh=(1, 1, 1), **changes):
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh))
    c = tiny.dictionary(**TWO, **sizes, **changes)
    for name, weight in (("Smooth", 0.3), ("Average", 0.7)):
        entry = {"term": f"{__name__}:{name}", "weight": weight, "factor": 1.5}
        c.loss.terms[name.lower()] = entry
    return config_lib.from_dict(c)


def first_state(program):
    state = jax.device_put(tiny.state(program), program.shardings)
    return state._replace(term_state=program.term_state(state.params))


@functools.cache
def run(mesh=(1, 1, 1), **changes):
    """(metrics of two steps, the state after them, the gradient of the first)."""
    c = config(mesh, optim__clip_norm=0.0, ema_decay=0.9, **changes)
    devices = sharding.make_mesh(c.mesh, jax.devices()[: int(np.prod(mesh))])
    program = train_step.build(c, devices, total_steps=c.total_steps, steps_per_epoch=1)
    state = first_state(program)
    batch = jax.device_put(tiny.batch(c), program.batch_sharding)
    metrics, gradient = [], None
    for _ in range(2):
        state, found = program.step(state, batch)
        metrics.append(jax.tree.map(float, found))
        if gradient is None:
            gradient = jax.tree.map(
                lambda m: np.asarray(m) / (1 - c.optim.b1), state.opt_state[1].mu
            )
    return metrics, jax.device_get(state), gradient


@pytest.mark.parametrize(
    "mesh,changes",
    [
        # The last one has more of all.
        pytest.param((2, 2, 2), {"microbatches": 2, "remat": "full"}, marks=pytest.mark.slow),
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
    for a, b in zip(jax.tree.leaves(state.term_state), jax.tree.leaves(other.term_state)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_over_the_global_batch():
    """The sums and the loss by hand, from one call of the model on the whole batch."""
    c = config()
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
    program = train_step.build(c, mesh, total_steps=c.total_steps, steps_per_epoch=1)
    state, batch = first_state(program), tiny.batch(c)
    (metrics, _), after, _ = run()
    model = grain.GRAIN(c.model)
    of_model = jax.device_put({"params": forward.without_terms(state.params)})

    @functools.partial(jax.jit, static_argnames="method")
    def apply(*given, method=None):
        return model.apply(of_model, *given, method=method)

    _, features = apply(batch, None, method="outputs_and_features")
    own = state.params["terms"]["smooth"]["map"]
    patches = features.tokens[:, 1:] @ own["kernel"] + own["bias"]
    keys = train_step.dropout_keys(c.seed, 0, jnp.arange(c.batch_size))
    keys = jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(b"smooth")))(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
    other = apply(batch.image[:, ::-1], method="image_tokens").mean((1, 2))
    texts = jnp.repeat(features.text.mean((1, 2, 3)), 2)
    loss = 1.5 * jnp.square(patches + 0.1 * noise[:, None]).sum((1, 2)) + other + texts
    count = 1 + batch.caption_id[:, 0] % 3
    np.testing.assert_allclose(metrics["loss_smooth"], np.average(loss, weights=count), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["smooth/norm"], jnp.abs(patches).mean((1, 2)).mean(), rtol=1e-5
    )
    weights = {"image_caption": 1, "smooth": 0.3, "average": 0.7}
    total = sum(weight * metrics[f"loss_{name}"] for name, weight in weights.items())
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    own = state.params["terms"]["average"]["map"]
    mirrored = apply(batch.image[:, :, ::-1], method="image_tokens")[:, 0]
    average = jnp.square((features.tokens[:, 0] - mirrored) @ own["kernel"]).sum(-1).mean()
    np.testing.assert_allclose(metrics["loss_average"], average, rtol=1e-5)
    # Each of two steps of the same batch moves the centre half of the way to the mean of that step.
    assert set(after.term_state) == {"smooth", "average"}
    assert np.abs(after.term_state["smooth"]["centre"]).max() > 1e-3


def test_parameters_of_terms_are_sharded_averaged_and_counted():
    _, state, gradient = run()
    for tree in (state.params, state.ema_params, gradient):
        assert set(tree["terms"]) == {"smooth", "average"}
        assert set(tree["terms"]["smooth"]["map"]) == {"kernel", "bias"}
    assert np.abs(gradient["terms"]["average"]["map"]["bias"]).max() > 0
    shapes = forward.Forward(grain.GRAIN(config().model), config()).init
    boxed = jax.eval_shape(shapes)["terms"]["smooth"]["map"]["kernel"]
    assert boxed.names == ("width", "vector")
    with_terms, without = (flops.per_image(c) for c in (config(), tiny.config(**TWO)))
    assert with_terms.image == without.image and with_terms.terms > without.image  # a second view
    assert with_terms.train > without.train + with_terms.terms


def test_a_fresh_state_does_not_depend_on_the_terms():
    """Parameters of the model are those of a run without terms; those of a term depend on its name alone."""
    c, plain = config(), tiny.config(**TWO)
    with_terms, without = (
        jax.jit(forward.Forward(grain.GRAIN(x.model), x).init)() for x in (c, plain)
    )
    jax.tree.map(np.testing.assert_array_equal, forward.without_terms(with_terms), dict(without))
    kernel = sharding.unbox(with_terms)["terms"]["smooth"]["map"]["kernel"]
    assert 0.1 < np.std(kernel) < 0.3


def test_a_term_without_parameters_leaves_the_tree_as_it_is():
    """So that a run may resume with it, or without."""
    plain, c = tiny.config(), tiny.dictionary()
    c.loss.terms.bare = {"term": f"{__name__}:Bare", "weight": 1.0}
    c = config_lib.from_dict(c)
    found = [jax.eval_shape(forward.Forward(grain.GRAIN(c.model), x).init) for x in (plain, c)]
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])


def test_an_average_in_the_state_follows_the_parameters_and_is_sharded_as_they_are():
    _, state, _ = run()
    c = config()
    program = train_step.build(
        c, sharding.make_mesh(c.mesh, jax.devices()[:1]), total_steps=10, steps_per_epoch=1
    )
    first = first_state(program)
    one = state.term_state["average"]
    assert one["steps"] == 2
    assert set(one["average"].term) == {"map"} and "terms" not in one["average"].model
    # After two steps: 9/16 of the first, 3/16 of those after one step, 1/4 of the last; of a frozen part all are equal.
    last, before = grain.flat(state.params), grain.flat(first.params)
    for name, x in grain.flat(one["average"].model).items():
        low, high = np.minimum(last[name], before[name]), np.maximum(last[name], before[name])
        assert (x >= low - 3e-3).all() and (x <= high + 3e-3).all(), name
    mesh = sharding.make_mesh(config((1, 8, 1)).mesh, jax.devices())
    program = train_step.build(config((1, 8, 1)), mesh, total_steps=10, steps_per_epoch=1)
    own, copied = program.shardings.params, program.shardings.term_state["average"]["average"]
    assert grain.flat(copied.model).items() <= grain.flat(own).items()
    assert copied.term == own["terms"]["average"]
    again = jax.device_get(jax.eval_shape(program.term_state, program.state.params))
    jax.tree.map(lambda a, b: a.shape == b.shape or 1 / 0, again, program.state.term_state)
