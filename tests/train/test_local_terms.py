"""Local loss terms: their loss by hand, their parameters and their state."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.models import grain
from grain_jax.train import flops, forward, sharding, train_step
from tests import tiny
from tests.train import terms
from tests.train.test_invariance import first_state, gradients, program_of, two_steps


def test_the_loss_is_the_mean_over_the_global_batch():
    """The sums and the loss by hand, from one call of the model on the whole batch."""
    c, state = program_of("terms", False)[0], first_state("terms")
    batch = tiny.batch(c)
    (metrics, _), (_, after) = two_steps("terms")
    model = grain.GRAIN(c.model)
    of_model = jax.device_put({"params": forward.without_terms(state.params)})

    @functools.partial(jax.jit, static_argnames="method")
    def apply(*given, method=None):
        return model.apply(of_model, *given, method=method)

    _, features = apply(batch, None, method="outputs_and_features")
    linear = state.params["terms"]["smooth"]["map"]
    patches = features.tokens[:, 1:] @ linear["kernel"] + linear["bias"]
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
    linear = state.params["terms"]["average"]["map"]
    mirrored = apply(batch.image[:, :, ::-1], method="image_tokens")[:, 0]
    average = jnp.square((features.tokens[:, 0] - mirrored) @ linear["kernel"]).sum(-1).mean()
    np.testing.assert_allclose(metrics["loss_average"], average, rtol=1e-5)
    # Each of two steps of the same batch moves the centre half of the way to the mean of that step.
    assert set(after.term_state) == {"smooth", "average"}
    assert np.abs(after.term_state["smooth"]["centre"]).max() > 1e-3


def test_parameters_of_terms_are_sharded_averaged_and_counted():
    c, (_, state) = program_of("terms", False)[0], two_steps("terms")[0]
    for tree in (state.params, state.ema_params):
        assert set(tree["terms"]) == {"smooth", "average"}
        assert set(tree["terms"]["smooth"]["map"]) == {"kernel", "bias"}
    of_bias = "terms/average/map/bias"
    assert [np.abs(x).max() > 0 for k, x in gradients(c, state).items() if of_bias in k] == [True]
    shapes = forward.Forward(
        grain.GRAIN(program_of("terms", False)[0].model), program_of("terms", False)[0]
    ).init
    boxed = jax.eval_shape(shapes)["terms"]["smooth"]["map"]["kernel"]
    assert boxed.names == ("width", "vector")
    with_terms, without = (
        flops.per_image(c) for c in (program_of("terms", False)[0], tiny.config(**terms.TWO_TOWERS))
    )
    assert with_terms.image == without.image and with_terms.terms > without.image  # a second view
    assert with_terms.train > without.train + with_terms.terms


def test_a_fresh_state_does_not_depend_on_the_terms():
    """Parameters of the model are those of a run without terms; those of a term depend on its name alone."""
    c, plain = program_of("terms", False)[0], tiny.config(**terms.TWO_TOWERS)
    with_terms, without = (
        jax.jit(forward.Forward(grain.GRAIN(x.model), x).init)() for x in (c, plain)
    )
    jax.tree.map(np.testing.assert_array_equal, forward.without_terms(with_terms), dict(without))
    kernel = sharding.unbox(with_terms)["terms"]["smooth"]["map"]["kernel"]
    assert 0.1 < np.std(kernel) < 0.3


def test_a_term_without_parameters_leaves_the_tree_as_it_is():
    """So that a run may resume with it, or without."""
    plain, c = tiny.config(), tiny.dictionary()
    c.loss.terms.bare = {"term": f"{terms.__name__}:Bare", "weight": 1.0}
    c = config_lib.from_dict(c)
    trees = [jax.eval_shape(forward.Forward(grain.GRAIN(c.model), x).init) for x in (plain, c)]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])


def test_an_average_in_the_state_follows_the_parameters_and_is_sharded_as_they_are():
    (_, state), first = two_steps("terms")[1], first_state("terms")
    term_state = state.term_state["average"]
    assert term_state["steps"] == 2
    assert set(term_state["average"].term) == {"map"} and "terms" not in term_state["average"].model
    # After two steps: 9/16 of the first, 3/16 of those after one step, 1/4 of the last; of a frozen part all are equal.
    last, before = grain.flat(state.params), grain.flat(first.params)
    for name, x in grain.flat(term_state["average"].model).items():
        low, high = np.minimum(last[name], before[name]), np.maximum(last[name], before[name])
        assert (x >= low - 3e-3).all() and (x <= high + 3e-3).all(), name
    program = program_of("terms", True)[1]
    of_params, copied = program.shardings.params, program.shardings.term_state["average"]["average"]
    assert grain.flat(copied.model).items() <= grain.flat(of_params).items()
    assert copied.term == of_params["terms"]["average"]
    again = jax.device_get(jax.eval_shape(program.term_state, program.state.params))
    jax.tree.map(lambda a, b: a.shape == b.shape or 1 / 0, again, program.state.term_state)
