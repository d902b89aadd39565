"""What the heads of the decoder give."""

import jax
import numpy as np

from grain_jax.models.grain import GRAIN
from tests import tiny


def test_the_image_embedding_is_the_sum_of_all_queries():
    alone, of_all = (tiny.config(model__decoder__image_pool=pool) for pool in ("query", "all"))
    image = tiny.batch(alone).image
    encode = dict(method="encode_image")
    params = jax.jit(lambda: GRAIN(alone.model).init(jax.random.key(0), image, **encode))()
    apply = lambda c: jax.jit(lambda p: GRAIN(c.model).apply(p, image, **encode))(params)
    (image_embed, region_embed, _), (of_queries, regions, _) = map(apply, (alone, of_all))
    total = np.float64(image_embed) + np.float64(region_embed).sum(axis=1)
    expected = total / np.linalg.norm(total, axis=-1, keepdims=True)
    np.testing.assert_allclose(of_queries, expected, atol=1e-6)
    np.testing.assert_array_equal(regions, region_embed)
