"""What the heads of the decoder give."""

import jax
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.models.grain import GRAIN
from tests import tiny


def test_the_image_embedding_is_the_sum_of_the_regions():
    config = tiny.config(model__decoder__image_pool="regions")
    model, batch = GRAIN(config.model), tiny.batch(config)
    params = model.init(jax.random.key(0), batch)["params"]
    assert "image_projection" not in params
    out = model.apply({"params": params}, batch)
    total = np.asarray(out.region_embed, np.float64).sum(axis=1)
    expected = total / np.linalg.norm(total, axis=-1, keepdims=True)
    np.testing.assert_allclose(out.image_embed, expected, atol=1e-6)


def test_a_sum_of_no_regions_is_a_line():
    changes = dict(model__decoder__image_pool="regions", model__decoder__queries=0)
    with pytest.raises(
        config_lib.ConfigError, match="image_pool: got 'regions' with model.decoder.queries=0"
    ):
        tiny.config(**changes, input__max_regions=0)
