"""Images in their own shape in views and local terms: padded they are the image alone; crops by torchvision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchvision.transforms import functional

from grain_jax import config as config_lib
from grain_jax.core import errors
from grain_jax.core.schema import Patches
from grain_jax.models import grain, places
from grain_jax.terms import views
from grain_jax.training import forward
from tests import tiny

PATCH = 4
GRIDS = ((2, 8), (4, 4), (5, 2), (1, 12))


def _images(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.integers(0, 256, shape).astype(np.uint8)
    return [draw(h * PATCH, w * PATCH, 3) for h, w in GRIDS]


def _patches(images, length=20, noise=7):
    """Padded by what nothing may see."""
    own = [np.asarray(places.of_pixels(x[None], PATCH))[0] for x in images]
    rows = [np.pad(x, ((0, length - len(x)), (0, 0)), constant_values=noise) for x in own]
    grid = [(x.shape[0] // PATCH, x.shape[1] // PATCH) for x in images]
    return Patches(np.stack(rows), np.array(grid, np.int32))


def _keys(count):
    return jax.vmap(jax.random.key)(jnp.arange(count, dtype=jnp.uint32))


def test_crops_are_torchvisions():
    """Of whole pixels of each image, larger and smaller than what they become."""
    images = _images()
    pixels = [[(1, 2, 6, 20), (0, 0, 8, 32)], [(3, 1, 9, 8), (8, 8, 8, 8)]]
    pixels += [[(4, 0, 16, 7), (0, 3, 20, 5)], [(0, 5, 4, 30), (1, 40, 2, 8)]]  # top, left, sides
    boxes = [
        [np.array([x, y, x + w, y + h]) / np.tile(i.shape[1::-1], 2) for y, x, h, w in of_image]
        for i, of_image in zip(images, pixels)
    ]
    image = views.as_floats(_patches(images))
    found = jax.jit(lambda *a: views.crops(*a, (8, 6)))(image, np.array(boxes, np.float32))
    for i, of_image in enumerate(pixels):
        whole = torch.tensor(images[i] / np.float32(255)).permute(2, 0, 1)
        for crop, at in zip(np.asarray(found[i]), of_image):
            expected = functional.resized_crop(whole, *at, [8, 6], antialias=True)
            np.testing.assert_allclose(crop, expected.permute(1, 2, 0), atol=2e-5)


def test_the_global_view_is_that_of_the_image_alone_and_local_ones_are_squares():
    images, config = _images(), config_lib.Views(local=3, size=8, global_min_area=1)
    run = jax.jit(lambda image, keys: views.make(image, keys, config))
    found = run(_patches(images), _keys(4))
    whole, flips = found.global_view, np.asarray(found.global_view.flipped)
    assert flips.any() and not flips.all()
    for i, image in enumerate(images[:2]):
        alone = jax.jit(lambda *a: views.make(*a, config).global_view)(
            image[None], _keys(4)[i:][:1]
        )
        own = places.of_pixels(alone.image[0], PATCH)[0]
        np.testing.assert_allclose(whole.image.pixels[i, 0, : len(own)], own, atol=1e-5)
    np.testing.assert_array_equal(whole.image.grid[:, 0], GRIDS)
    sides = np.diff(np.asarray(found.local.boxes_xyxy).reshape(4, 3, 2, 2), axis=2)[:, :, 0]
    aspect = sides[..., 0] / sides[..., 1] * np.divide(*np.array(GRIDS).T[::-1])[:, None]
    near = np.abs(np.log(aspect)) <= np.log(config.max_aspect) + 1e-3  # in pixels
    assert near[1:3].all() and found.local.image.shape == (4, 3, 8, 8, 3)
    fits = (np.asarray(found.local.boxes_xyxy) >= 0) & (np.asarray(found.local.boxes_xyxy) <= 1)
    assert fits.all()
    with pytest.raises(errors.UserError, match="input.views.global_min_area: got 0.5, expected 1"):
        views.make(_patches(images), _keys(4), config_lib.Views(local=1, global_min_area=0.5))


TERMS = {
    "crop_distillation": dict(crops=2),
    "masked_patches": dict(prototypes=8, hidden=16, bottleneck=8),
    "self_distillation": dict(prototypes=8, hidden=16, bottleneck=8, reads="mean", image=True),
    "text_pooled": dict(group=2, heads=4),
    "text_decoder": dict(depth=1, row_length=32, dropout=0.0),
}


def test_a_term_that_knows_no_places_refuses():
    entry = dict(term="examples.loss.smoothness:Smoothness", weight=1.0)
    c = tiny.small(model__image__patch_size=PATCH, loss__terms=dict(own=entry))
    run = forward.Forward(grain.GRAIN(c.model), c)
    batch = tiny.batch(c)._replace(image=_patches(_images() * 4))
    with pytest.raises(errors.UserError, match="loss.terms.own: got images in their own shape"):
        jax.eval_shape(lambda: run(forward.sharding.unbox(run.init()), batch))


def test_terms_see_no_padding():
    """All terms of a step give the same sums of each image, whatever the padding is."""
    entries = {name: dict(term=name, weight=1.0, **options) for name, options in TERMS.items()}
    c = tiny.small(
        batch_size=4,
        input__lanes=1,
        model__image__patch_size=PATCH,
        model__decoder=None,
        model__image__pool="mean",
        loss__box=0.0,
        loss__region_description=0.0,
        teacher__kind="ema",
        input__views__local=2,
        input__views__size=8,
        loss__terms=entries,
    )
    run = forward.Forward(grain.GRAIN(c.model), c)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: jax.tree.map(lambda x: x, forward.sharding.unbox(run.init())))
    draw = lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32)
    params, batch = jax.tree.map(draw, shapes), tiny.batch(c)

    @jax.jit
    def sums(params, image):
        given = run.given_at_step_0(params)
        return run(params, batch._replace(image=image), _keys(4), given)

    images = _images()
    near, far = (sums(params, _patches(images, noise=x)).local for x in (0, 200))
    assert set(near) == set(TERMS)
    for name, of_near in near.items():
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, 2e-4, 1e-5, err_msg=name),
            of_near,
            far[name],
        )
