"""What the heads of the decoder give."""

import jax
import numpy as np

from grain_jax.models.grain import GRAIN
from tests import tiny


def test_the_image_embedding_is_the_sum_of_all_queries():
    alone, of_all = (tiny.config(model__decoder__image_pool=pool) for pool in ("query", "all"))
    batch = tiny.batch(alone)
    params = GRAIN(alone.model).init(jax.random.key(0), batch)
    one, out = (GRAIN(c.model).apply(params, batch) for c in (alone, of_all))
    total = np.float64(one.image_embed) + np.float64(one.region_embed).sum(axis=1)
    expected = total / np.linalg.norm(total, axis=-1, keepdims=True)
    np.testing.assert_allclose(out.image_embed, expected, atol=1e-6)
    np.testing.assert_array_equal(out.region_embed, one.region_embed)
