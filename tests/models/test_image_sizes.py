"""The built-in image tower on images of other sizes than its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
import transformers
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip

from grain_jax import config as config_lib
from grain_jax.core import errors
from grain_jax.models import grain, vit
from tests import perturbed
from tests.models.test_rotary import _images, _tower
from tests.models.test_towers import dictionary

FLOAT = jnp.dtype("float32")


@pytest.mark.parametrize("side,leading,grid", [(7, 1, 3), (4, 0, 7), (14, 1, 6), (5, 1, 1), (2, 0, 3)])
def test_positions_are_resized_as_by_transformers(side, leading, grid):
    """With CLIP's class token, and without one as SigLIP."""
    rng = np.random.default_rng(side)
    positions = rng.normal(size=(leading + side**2, 6)).astype(np.float32)
    kind, config = [
        (modeling_siglip.SiglipVisionEmbeddings, transformers.SiglipVisionConfig),
        (modeling_clip.CLIPVisionEmbeddings, transformers.CLIPVisionConfig),
    ][leading]
    module = kind(config(hidden_size=6, num_attention_heads=1, image_size=2 * side, patch_size=2))
    theirs = module.position_embedding.weight
    theirs.data = torch.tensor(positions)
    tokens = torch.zeros(1, leading + grid**2, 6)
    expected = module.interpolate_pos_encoding(tokens, 2 * grid, 2 * grid)[0]
    cotangent = rng.normal(size=expected.shape).astype(np.float32)
    expected.backward(torch.tensor(cotangent))
    resized, pull = jax.vjp(lambda x: vit.resized_positions(x, leading, grid), positions)
    np.testing.assert_allclose(resized, expected.detach(), atol=2e-6)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], theirs.grad, atol=1e-5)


@pytest.mark.parametrize("position_init", ["normal", "sincos2d"])
def test_parameters_are_those_of_the_configured_size(position_init):
    module = vit.ImageTransformer(_tower(image_size=32, position_init=position_init), FLOAT)
    init = jax.jit(module.init)
    same, other = (init(jax.random.key(0), _images(size)) for size in (32, 24))
    jax.tree.map(np.testing.assert_array_equal, same, other)
    assert grain.flat(same["params"])["position_embed"].shape == (17, 48)
    with pytest.raises(errors.UserError, match="image: got 36 x 36 pixels, expected a square of"):
        module.apply(same, _images(36))
    with pytest.raises(errors.UserError, match="got 24 x 32 pixels"):
        module.apply(same, _images(32)[:, :24])


def test_a_tower_of_a_user_that_takes_its_own_size_alone_says_so():
    model = grain.GRAIN(config_lib.from_dict(dictionary()).model)
    said = "Colours got an image of 8 x 8 pixels, expected model.image.image_size = 16; a"
    with pytest.raises(errors.UserError, match=said) as error:
        model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)), method="image_tokens")
    assert "\n" not in str(error.value)


def test_boxes_and_queries_of_an_image_of_another_size():
    """They read its 9 patches, not the 25 of the config."""
    model = perturbed.tiny(boxes__kind="roi_align", image__depth=1, decoder__depth=1)
    params, module = perturbed.params(model), grain.GRAIN(model)
    images = _images(24)
    boxes = np.array([[[0.1, 0.2, 0.7, 0.8], [0, 0, 1, 1]]] * 2, np.float32)

    def all_of(module):
        tokens = module.image_tokens(images)
        return tokens, module.embeddings(tokens), module.box_embeddings(tokens, boxes)

    run = jax.jit(lambda params: module.apply({"params": params}, method=all_of))
    tokens, (image_embed, regions, *_), box_embed = run(params)
    assert tokens.shape == (2, 10, 48)
    assert image_embed.shape == (2, 28) and regions.shape == (2, 3, 28)
    np.testing.assert_allclose(np.linalg.norm(box_embed, axis=-1), np.ones((2, 2)), atol=1e-5)
    head = model.boxes
    features = torch.tensor(np.asarray(tokens[:, 1:])).reshape(2, 3, 3, 48).permute(0, 3, 1, 2)
    aligned = torchvision.ops.roi_align(
        features, list(torch.tensor(boxes * 3)), head.bins, 1.0, head.samples, aligned=True
    )
    rows = aligned.permute(0, 2, 3, 1).reshape(2, 2, -1).numpy()
    expected = rows @ np.asarray(grain.flat(params)["box_projection/kernel"])
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(box_embed, expected, atol=1e-5)
