"""A share of the patches in training: what is kept, and its gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision

from examples.loss import smoothness
from grain_jax.core import boxes as boxes_lib
from grain_jax.core import errors
from grain_jax.models import grain
from grain_jax.train import flops, forward, train_step
from tests import perturbed, tiny
from tests.models.test_towers import Colours

pytestmark = pytest.mark.long

SIDE, PATCH = 4, 8
TWO_TOWERS = tiny.TWO_TOWERS | {"model__image__image_size": SIDE * PATCH}
BOXES = {"model__boxes__kind": "roi_align", "loss__box_description": 1.0, "input__max_regions": 5}


def config(**changes):
    return tiny.small(batch_size=8, **TWO_TOWERS | changes)


def keys_of(images):
    return train_step.dropout_keys(3, 0, jnp.arange(images))


def test_random_patches_of_an_image():
    draw = lambda keep, images=64: np.asarray(
        forward.draw_kept(keys_of(images), SIDE**2, forward.patches_seen(config(model__image__keep=keep)))
    )
    kept = draw(0.3)
    assert kept.shape == (64, 5) and (np.diff(kept) > 0).all()  # 4.8 of 16
    counts = np.bincount(kept.ravel(), minlength=16)
    assert counts.min() > 5 and counts.max() < 40  # 20 each on average
    assert len({tuple(row) for row in kept}) > 60
    np.testing.assert_array_equal(kept[:3], draw(0.3, 3))  # of an image and its key alone
    assert draw(0.01).shape == (64, 1)


def _box_weights(boxes_cxcywh):
    """torchvision's weights of the patches in RoIAlign: [B, R, P]."""
    corners = torch.tensor(np.asarray(boxes_lib.cxcywh_to_xyxy(boxes_cxcywh)) * SIDE)
    one_hot = torch.eye(SIDE**2).reshape(1, SIDE**2, SIDE, SIDE).expand(len(corners), -1, -1, -1)
    weights = torchvision.ops.roi_align(one_hot, list(corners), 1, 1.0, 4, aligned=True)
    return weights.reshape(*corners.shape[:2], SIDE**2).numpy()


def _of_smaller_images(model, params, batch, kept, weights):
    """Embeddings of images and boxes: an image of the kept patches alone, which have their old positions.

    A box has the mean of its kept patches by their weights; 0 without any.
    """
    side, images = int(kept.shape[1] ** 0.5), np.arange(len(kept))[:, None]
    image = dataclasses.replace(model.image, image_size=side * PATCH, keep=1.0)
    module = grain.GRAIN(dataclasses.replace(model, image=image))
    patches = batch.image.reshape(-1, SIDE, PATCH, SIDE, PATCH, 3).swapaxes(2, 3)
    chosen = patches.reshape(-1, SIDE**2, PATCH, PATCH, 3)[images, kept]
    small = chosen.reshape(-1, side, side, PATCH, PATCH, 3).swapaxes(2, 3)
    small = small.reshape(-1, side * PATCH, side * PATCH, 3)
    weights = np.take_along_axis(weights, kept[:, None], axis=2)
    weights = weights / weights.sum(-1, keepdims=True).clip(1e-12)
    positions = params["image"]["position_embed"]

    def of_image(image, kept, weights):
        rows = positions[jnp.append(0, 1 + kept)]
        resized = params | {"image": params["image"] | {"position_embed": rows}}
        tokens = module.apply({"params": resized}, image[None], method="image_tokens")
        (embed,) = module.apply({"params": resized}, tokens, method="embeddings")[0]
        return embed, grain.normalize(weights @ tokens[0, 1:] @ params["box_projection"]["kernel"])

    return jax.vmap(of_image)(small, kept, weights)


def test_the_gradient_is_that_of_the_kept_patches():
    c, rng = config(model__image__keep=0.25, **BOXES), np.random.default_rng(0)
    params, batch, keys = perturbed.params(c.model), tiny.batch(c), keys_of(8)
    kept = np.asarray(forward.draw_kept(forward.folded(keys, forward.KEEP), SIDE**2, 4))
    of_run = lambda params: forward.Forward(c)(params, batch, keys)
    read = lambda out: (out.image_embed, out.box_embed)
    ahead = [
        rng.normal(size=x.shape).astype(np.float32) for x in jax.eval_shape(lambda: read(of_run(params)))
    ]

    def with_gradients(embeddings):
        def total(params):
            embeds = embeddings(params)
            return sum((x * a).sum() for x, a in zip(embeds, ahead)), embeds

        return jax.jit(jax.grad(total, has_aux=True))(params)

    grads, embeds = with_gradients(lambda params: read(of_run(params)))
    rest = batch, kept, _box_weights(batch.region_boxes_cxcywh)
    expected, theirs = with_gradients(lambda params: _of_smaller_images(c.model, params, *rest))
    for ours, other in zip(embeds, theirs, strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-6)
    most = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    for name, grad in grain.flat(grads).items():
        other = grain.flat(expected)[name]  # 0 for the biases of keys, and for texts
        np.testing.assert_allclose(grad, other, rtol=1e-5, atol=1e-6 * most, err_msg=name)


def test_flops_are_those_of_the_kept_tokens():
    """By hand, of one layer: 4 maps, the MLP, two products of attention; embedding, positions, projection."""
    c = config()
    width, mlp, pixels = 32, 64, 3 * PATCH**2

    def by_hand(n):
        layer = (n + 1) * (8 * width**2 + 4 * width * mlp) + 4 * (n + 1) ** 2 * width
        return layer + 2 * n * pixels * width + 2 * width * c.model.embed_dim

    positions = 2 * 4 * SIDE**2 * width  # a product with one-hot rows
    assert flops.per_image(config(model__image__keep=0.25)).image == by_hand(4) + positions
    assert flops.per_image(c).image == by_hand(16)


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"model__image__tower": f"{Colours.__module__}:Colours", "model__image__pool": "none"},
            "a tower with takes_kept = True",
        ),
        ({"loss__terms__x": {"term": f"{smoothness.__name__}:Smoothness", "weight": 1.0}}, "x of loss"),
    ],
)  # fmt: skip
def test_what_sees_all_patches_is_a_line(changes, message):
    c = config(model__image__keep=0.5, **changes)
    with pytest.raises(errors.UserError, match=rf"^model\.image\.keep: got .*{message}"):
        program = tiny.program(c, 1)
        program.step.lower(program.state, program.batch)
