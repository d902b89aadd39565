"""What models start from: the reference's distributions, and for small ones positions that differ."""

import json

import jax
import numpy as np
import pytest

from grain_jax.models import grain, region_decoder, vit
from tests import initialisation_golden, tiny


def test_short_periods_tell_the_patches_of_a_small_grid_apart():
    still = lambda period: (vit.sincos2d(8, 96, period).std(0) < 0.05).mean()
    assert still(16.0) < 0.05  # nearly every channel varies over the grid
    assert still(1e4) > 0.6  # MoCo's period: most do not


def test_the_gain_scales_queries_keys_and_values_alone():
    def params(gain):
        config = tiny.config(model__decoder__qkv_init_gain=gain).model.decoder
        decoder = region_decoder.QueryDecoder(config, np.dtype("float32"))
        variables = jax.jit(decoder.init)(jax.random.key(0), np.zeros((1, 5, 32), np.float32))
        return jax.tree.leaves_with_path(variables["params"]["blocks"])

    for (path, plain), (_, other) in zip(params(1.0), params(2.5), strict=True):
        name = jax.tree_util.keystr(path)
        scaled = any(f"['{part}']['kernel']" in name for part in ("query", "key", "value"))
        np.testing.assert_allclose(other, plain * (2.5 if scaled else 1.0), rtol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def golden():
    return json.loads(initialisation_golden.GOLDEN.read_text())


@pytest.mark.parametrize("block_init", ["torch", "trunc_normal"])
def test_every_parameter_starts_as_the_references(golden, block_init):
    model = initialisation_golden.model(block_init=block_init)
    expected = dict(golden["reference"])
    texts = np.zeros((1, 1, model.text.context_length), np.int32)
    image = np.zeros((1, model.image.image_size, model.image.image_size, 3), np.uint8)

    def encode(module):
        if block_init == "trunc_normal":
            return module.image_tokens(image)
        encoded = module.embeddings(module.image_tokens(image))
        return encoded, module.encode_text(texts, texts, texts, texts[0, :, :2])

    if block_init == "trunc_normal":  # the documented difference: the image's blocks as timm makes them
        expected |= golden["timm_blocks"]
        expected = {x: expected[x] for x in expected if x.startswith(("image/", "logit_scale"))}
    init = jax.jit(lambda key: grain.GRAIN(model).init(key, method=encode))
    params = grain.flat(init(jax.random.key(0))["params"])
    ours = {name: initialisation_golden.statistics(x) for name, x in params.items()}
    assert ours.keys() == expected.keys()
    faults = []
    for name, theirs in expected.items():
        got = ours[name]
        error = 5 * (1 / got["values"] + 1 / theirs["values"]) ** 0.5 * theirs["std"]
        largest = max(-theirs["min"], theirs["max"])
        # The extremes of many values are near each other; of few they only stay below the largest.
        same = 0.2 * largest if got["values"] >= 1000 else 2 * largest
        if (
            abs(got["mean"] - theirs["mean"]) > error + 1e-9
            or abs(got["std"] - theirs["std"]) > error
            or max(-got["min"], got["max"]) > 1.2 * largest
            or abs(got["min"] - theirs["min"]) > same
            or abs(got["max"] - theirs["max"]) > same
            or abs(got["zeros"] - theirs["zeros"]) > 1e-4
        ):
            faults.append(f"{name}: {got}, the reference {theirs}")
    assert not faults, "\n".join(faults)
