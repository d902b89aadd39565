"""What small models start from: positions that differ, and attention whose sharpness can be set."""

import jax
import numpy as np

from grain_jax import train_step
from grain_jax.models import vit
from grain_jax.models.grain import GRAIN
from tests import tiny


def test_short_periods_tell_the_patches_of_a_small_grid_apart():
    still = lambda period: (vit.sincos2d(8, 96, period).std(0) < 0.05).mean()  # noqa: E731
    assert still(16.0) < 0.05  # nearly every channel varies over the grid
    assert still(1e4) > 0.6  # MoCo's period: most do not


def test_the_gain_scales_queries_keys_and_values_alone():
    def params(gain):
        c = tiny.config(model__decoder__qkv_init_gain=gain)
        batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), train_step.abstract_batch(c))
        block = jax.jit(GRAIN(c.model).init)(jax.random.key(0), batch)["params"]["decoder"][
            "blocks"
        ]
        return jax.tree.map(np.asarray, jax.tree.leaves_with_path(block))

    for (path, one), (_, other) in zip(params(1.0), params(2.5), strict=True):
        name = jax.tree_util.keystr(path)
        scaled = any(f"['{part}']['kernel']" in name for part in ("query", "key", "value"))
        np.testing.assert_allclose(other, one * (2.5 if scaled else 1.0), rtol=1e-5, err_msg=name)
