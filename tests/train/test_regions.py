"""Regions beside a published model (`model.decoder.image_pool=tower`), which scores images as before."""

import jax
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.configs import regions
from grain_jax.models import grain
from grain_jax.train import initialise
from tests import siglip, tiny


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a SigLIP: the towers of big_vision's golden."""
    return siglip.convert_golden(tmp_path_factory.mktemp("siglip"))


def _config(folder, **overrides):
    """A small run of the config `regions` on the folder, with the synthetic source."""
    c, small = regions.get_config(str(folder)), tiny.dictionary()
    for group in ("input", "text"):
        c[group] = small[group]
    c.text.packing = False
    c.update(batch_size=16, dtype="float32", total_epochs=None, total_steps=10)
    c.optim.update(warmup_epochs=None, warmup_steps=2)
    c.model.decoder.update({k: v for k, v in small.model.decoder.items() if k != "image_pool"})
    c.evals = {}
    c.update_from_flattened_dict(overrides)
    return config_lib.from_dict(c)


def test_whole_images_are_scored_as_published_after_every_step(published):
    c = _config(published, **{"model.decoder.boxes": "pointer", "model.decoder.reads_box": True})
    program = tiny.program(c, 1)
    state = initialise.state_of_step_0(c, program, lambda line: None)
    first = jax.device_get(state.params)
    model, stored, _ = saved_model.load_model(published)
    batch = tiny.batch(c)
    outputs = lambda config, params: jax.jit(grain.GRAIN(config).apply)({"params": params}, batch)
    expected = outputs(model, stored)
    for _ in range(2):
        state, _ = program.step(state, batch)
    got = outputs(c.model, jax.device_get(state.params))
    of_images = lambda x: (x.image_embed, x.text_embed, *x.scales[:2])
    for ours, theirs in zip(of_images(got), of_images(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert got.scales.region_logit_bias != got.scales.logit_bias
    before, after = grain.flat(first), grain.flat(jax.device_get(state.params))
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    stored = set(grain.flat(stored))
    assert not moved & stored
    assert {name.partition("/")[0] for name in moved} >= {
        *("decoder", "pointer", "region_projection", "region_logit_scale", "region_logit_bias")
    }
    moments = {n.split("/mu/")[-1] for n in grain.flat(program.state.opt_state) if "/mu/" in n}
    assert moments and not moments & stored
