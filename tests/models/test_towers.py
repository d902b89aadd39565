"""Towers of a user in the model: what they get and give, and what the config says of those that pool."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.core import errors
from grain_jax.models import grain, layers, towers
from grain_jax.train import flops
from tests import tiny

IMAGE, TEXT = "tests.models.test_towers:Colours", "tests.models.test_towers:Bag"


class Colours(towers.ImageTower):
    """One vector an image, of its mean colour."""

    pooled = True

    @nn.compact
    def __call__(self, image):
        return layers.dense(
            self.config.width,
            ("patch",),
            ("width",),
            dtype=self.dtype,
            kernel_init=nn.initializers.ones_init(),
            name="colour",
        )(image.mean(axis=(1, 2)))


class Bag(towers.TextTower):
    """One vector a row, the mean of the embeddings of its tokens."""

    pooled = True

    @nn.compact
    def __call__(self, tokens, positions, segments):
        c = self.config
        table = layers.parameter(
            self, "table", layers.normal(1.0), ("vocab", "width"), (c.vocab_size, c.width)
        )
        real = (segments > 0)[..., None]
        return (table[tokens] * real).sum(axis=2) / real.sum(axis=2).clip(1)


class NotATower(nn.Module):
    """A module that derives from no tower."""


def dictionary(**overrides):
    c = tiny.dictionary(model__image__tower=IMAGE, model__text__tower=TEXT, input__max_regions=0, **overrides)
    c.model.decoder = None
    c.text.packing = False
    return c


def test_towers_that_pool_are_projected_alone():
    c = config_lib.from_dict(dictionary())
    model = grain.GRAIN(c.model)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 16, 16, 3), np.uint8)
    tokens = rng.integers(1, 400, (4, 1, 32)).astype(np.int32)
    segments = np.broadcast_to(np.arange(32) < 5, tokens.shape).astype(np.int32)
    end_at = np.array([[0, 4]] * 4, np.int32)

    def encode(module):
        image_embed, regions, *_ = module.embeddings(module.image_tokens(image))
        return image_embed, regions, module.encode_text(tokens, segments, segments, end_at)[0]

    out, variables = model.init_with_output(jax.random.key(0), method=encode)
    image_embed, regions, text_embed = out
    assert image_embed.shape == text_embed.shape == (4, 16) and regions.shape == (4, 0, 16)
    flat = grain.flat(nn.meta.unbox(variables["params"]))
    mean = (image / 255.0 - c.model.image.pixel_mean) / c.model.image.pixel_std
    features = mean.mean(axis=(1, 2)) @ flat["image/colour/kernel"]
    expected = grain.normalize(features @ flat["image_projection/kernel"])
    np.testing.assert_allclose(image_embed, expected, atol=1e-5)
    features = np.asarray(flat["text/table"])[tokens[:, 0, :5]].mean(axis=1)
    expected = grain.normalize(features @ flat["text_projection/kernel"])
    np.testing.assert_allclose(text_embed, expected, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(text__packing=True), "text.packing: got True, expected False"),
        (dict(model__image__pool="mean"), "model.image.pool: got 'mean', expected none"),
        (dict(model__text__pool="map"), "model.text.pool: got 'map', expected end"),
        (dict(model__text__tower="bert"), "got 'bert', expected one of transformer, or module:"),
    ],
)
def test_what_a_tower_cannot_is_a_line(change, message):
    c = dictionary()
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in change.items()})
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.from_dict(c)
    assert message in str(error.value)


def test_a_class_that_is_no_tower_is_a_line():
    c = config_lib.from_dict(dictionary()).model.text
    with pytest.raises(errors.UserError, match="expected a class that derives from .*TextTower"):
        towers.text_tower(dataclasses.replace(c, tower="tests.models.test_towers:NotATower"))


def test_flops_of_towers_without_formulas():
    count = flops.per_image(config_lib.from_dict(dictionary()))
    assert (count.image, count.text) == (2 * 3 * 32 + 2 * 32 * 16, 2 * 32 * 16)


def test_a_tower_of_a_user_that_takes_its_own_size_alone_says_so():
    model = grain.GRAIN(config_lib.from_dict(dictionary()).model)
    said = "Colours got an image of 8 x 8 pixels, expected model.image.image_size = 16; a"
    with pytest.raises(errors.UserError, match=said) as error:
        model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)), method="image_tokens")
    assert "\n" not in str(error.value)
