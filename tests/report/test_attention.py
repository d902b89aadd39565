import jax
import numpy as np
import pytest

from grain_jax.models import grain
from grain_jax.report import attention
from tests import tiny
from tests.report import workdirs


@pytest.fixture(scope="module")
def made():
    c = tiny.config(model__decoder__heads=2)
    return grain.GRAIN(c.model), workdirs.parameters(c.model), tiny.batch(c).image[:3]


def test_attention_is_the_models_own(made):
    module, params, images = made
    got = attention.cross_attention(module.config, params, images)
    queries, tokens = module.config.decoder.queries + 1, 1 + 2 * 2
    assert got.weights.shape == (2, 3, 2, queries, tokens)
    assert np.abs(got.weights.sum(-1) - 1).max() < 1e-5
    # The weights, applied to the values and projected, are what the attention layers returned.
    out = params["decoder"]["blocks"]["cross_attention"]["out"]
    mixed = np.einsum("tbkqs,tbskh->tbqkh", got.weights, got.values)
    ours = np.einsum("tbqkh,tkhe->tbqe", mixed, out["kernel"]) + out["bias"][:, None, None]
    assert np.abs(ours - got.outputs).max() < 1e-5
    # And layers that run one by one come to what the model's scan over them comes to.
    _, hidden = jax.jit(module.apply, static_argnames="method")(
        {"params": params}, images, method=grain.GRAIN.image_features
    )
    norm = params["decoder"]["norm"]
    x = got.content
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    assert np.abs(x * norm["scale"] + norm["bias"] - np.asarray(hidden[-1])).max() < 1e-5


def test_attention_goes_where_the_keys_are(made):
    """Keys that all are equal leave nothing to choose between: every token gets the same share."""
    module, params, images = made
    cross = params["decoder"]["blocks"]["cross_attention"]
    flat = jax.tree.map(lambda x: x, params)
    flat["decoder"]["blocks"]["cross_attention"] = {
        **cross,
        "key": jax.tree.map(np.zeros_like, cross["key"]),
    }
    got = attention.cross_attention(module.config, flat, images)
    assert np.abs(got.weights - 1 / got.weights.shape[-1]).max() < 1e-6
    own = attention.cross_attention(module.config, params, images)
    assert np.abs(own.weights - 1 / got.weights.shape[-1]).max() > 1e-3


def test_grid():
    assert attention.grid(tiny.config().model) == (1, 2)
