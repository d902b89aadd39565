"""A share of the patches in training: what is kept, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F

from examples.loss import smoothness
from grain_jax.core import errors, schema
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


def _tower_in_torch(p, pixels, kept):
    """The image tower in float64: embeddings of images whose patches are `at`, and the tokens of these."""
    weight = lambda name: p[f"image/{name}"]
    norm = lambda x, name: F.layer_norm(
        x, x.shape[-1:], weight(f"{name}/scale"), weight(f"{name}/bias"), 1e-6
    )
    b, width = len(pixels), weight("class_token").shape[0]
    x = pixels.reshape(b, SIDE, PATCH, SIDE, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, SIDE**2, -1) @ weight("patch_embed/kernel") + weight("patch_embed/bias")
    x = torch.stack([image[i] + weight("position_embed")[1 + i] for image, i in zip(x, kept)])
    first = weight("class_token") + weight("position_embed")[0]
    x = torch.cat([first.expand(b, 1, width), x], 1)
    layer = lambda name: weight(f"blocks/{name}")[0]
    of_layer = lambda x, name: F.layer_norm(
        x, x.shape[-1:], layer(f"{name}/scale"), layer(f"{name}/bias"), 1e-6
    )
    y = of_layer(x, "norm_1")
    q, k, v = (
        torch.einsum("bne,ekd->bknd", y, layer(f"attention/{name}/kernel"))
        + layer(f"attention/{name}/bias")[:, None]
        for name in ("query", "key", "value")
    )
    y = F.scaled_dot_product_attention(q, k, v)
    out = layer("attention/out/kernel")
    x = x + torch.einsum("bknd,kde->bne", y, out) + layer("attention/out/bias")
    y = of_layer(x, "norm_2") @ layer("mlp/in/kernel") + layer("mlp/in/bias")
    x = x + F.gelu(y) @ layer("mlp/out/kernel") + layer("mlp/out/bias")
    tokens = norm(x, "norm")[:, 1:]
    embed = F.normalize(tokens.mean(1) @ p["image_projection/kernel"], dim=-1)
    return embed, tokens


def _boxes_in_torch(p, tokens, kept, corners):
    """RoIAlign of the kept tokens: torchvision's weights of each patch over their sum; 0 without any."""
    one_hot = torch.eye(SIDE**2, dtype=torch.float64).reshape(1, SIDE**2, SIDE, SIDE)
    means = []
    for image, i, boxes in zip(tokens, kept, corners):
        weights = torchvision.ops.roi_align(one_hot, [boxes * SIDE], 1, 1.0, 4, aligned=True)
        weights = weights.flatten(1)[:, i]
        means.append(weights @ image / weights.sum(1, keepdim=True).clamp(min=1e-12))
    return F.normalize(torch.stack(means) @ p["box_projection/kernel"], dim=-1)


@pytest.fixture(scope="module")
def case():
    """(config, parameters, batch, keys, kept patches)."""
    c = config(model__image__keep=0.5, model__image__qk_norm=False, **BOXES)
    keys = keys_of(8)
    kept = forward.draw_kept(forward.folded(keys, forward.KEEP), SIDE**2, 8)
    return c, perturbed.params(c.model), tiny.batch(c), keys, np.asarray(kept)


def test_the_gradient_is_that_of_the_kept_patches(case):
    c, params, batch, keys, kept = case
    of_run = forward.Forward(c)
    rng = np.random.default_rng(0)
    read = lambda out: (out.image_embed, out.box_embed)
    shapes = jax.eval_shape(lambda: read(of_run(params, batch, keys)))
    ahead = [rng.normal(size=x.shape).astype(np.float32) for x in shapes]

    @jax.jit
    def ours(params):
        embeds = read(of_run(params, batch, keys))
        return sum((x * a).sum() for x, a in zip(embeds, ahead)), embeds

    grads, embeds = jax.grad(ours, has_aux=True)(params)

    theirs = {
        name: torch.tensor(np.asarray(x, np.float64), requires_grad=True)
        for name, x in grain.flat(params).items()
    }
    pixels = torch.tensor((batch.image / 255 - schema.IMAGE_MEAN) / schema.IMAGE_STD)
    kept = torch.tensor(kept).long()
    embed, tokens = _tower_in_torch(theirs, pixels.double(), kept)
    centre, half = np.split(batch.region_boxes_cxcywh * np.array([1, 1, 0.5, 0.5]), 2, -1)
    corners = torch.tensor(np.concatenate([centre - half, centre + half], -1)).double()
    expected = embed, _boxes_in_torch(theirs, tokens, kept, corners)
    sum((x * torch.tensor(a)).sum() for x, a in zip(expected, ahead)).backward()
    for ours_now, other in zip(embeds, expected):
        np.testing.assert_allclose(ours_now, other.detach(), atol=2e-6)
    of_images = {k: v for k, v in grain.flat(grads).items() if not k.startswith(("text", "logit"))}
    most = max(abs(theirs[name].grad.numpy()).max() for name in of_images)
    for name, grad in of_images.items():
        other = theirs[name].grad.numpy()  # 0 for the biases of keys
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
