"""Positions of the image tower and the options of DINOv3, against transformers; images of other sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip

from grain_jax import config as config_lib
from grain_jax.convert import formats, tables
from grain_jax.core import errors
from grain_jax.models import grain, vit
from grain_jax.train import flops, optim
from tests import foreign, tiny

SIZES: dict[str, Any] = dict(
    patch_size=8, width=48, depth=2, heads=3, mlp_dim=64, qk_norm=False, norm_eps=1e-5
)
DINOV3 = dict(positions=False, rope="centres", registers=3, layer_scale=True, key_bias=False)


def _tower(**changes):
    return config_lib.ImageTower(**SIZES | changes)


def _images(size):
    return np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("size,gated", [(32, False), (48, True)])
def test_dinov3_of_transformers(size, gated):
    """Tokens, and the gradients of their weighted sum by every parameter; at another size rope follows."""
    config = transformers.DINOv3ViTConfig(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3
    )
    config.update(dict(intermediate_size=64, num_register_tokens=3, use_gated_mlp=gated))
    config.hidden_act = "silu" if gated else "gelu"
    module = foreign.perturb(transformers.DINOv3ViTModel(config))
    kind = dict(mlp="gated", activation="silu") if gated else {}
    rows = formats.hf_dinov3("model.")
    ours = vit.ImageTransformer(_tower(image_size=size, **DINOV3, **kind), jnp.dtype("float32"), remat="qkv")
    images, parameters = _images(size), dict(module.named_parameters())
    boxed = jax.eval_shape(ours.init, jax.random.key(0), images)["params"]
    shapes = {f"image/{name}": x.shape for name, x in grain.flat(boxed).items()}
    params = tables.read(rows, {k: v.detach().numpy() for k, v in parameters.items()}, shapes)
    theirs = module(foreign.torch_images(images)).last_hidden_state
    weight = np.random.default_rng(2).normal(size=theirs.shape).astype(np.float32)
    (theirs * torch.from_numpy(weight)).sum().backward()

    def scalar(params):
        tokens = ours.apply({"params": tables.nested(params)["image"]}, images)
        return jnp.sum(tokens * weight), tokens

    (_, tokens), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)
    foreign.close(np.asarray(tokens), theirs.detach().numpy())
    named = tables.write(rows, grads)
    assert named.keys() == {name for name, x in parameters.items() if x.grad is not None}
    most = max(np.abs(grad).max() for grad in named.values())
    for name, grad in named.items():
        theirs = parameters[name].grad.numpy()
        if np.abs(theirs).max() < 1e-6 * most:  # a key's bias without rotation
            assert np.abs(grad).max() < 1e-6 * most, name
        else:
            foreign.close(grad.reshape(theirs.shape), theirs)


def test_registers_follow_the_class_token_and_have_no_position():
    """With layer scales of 0 the layers add nothing, so that the tokens are those before them."""
    tower = _tower(image_size=16, registers=2, layer_scale=True)
    module = vit.ImageTransformer(tower, jnp.dtype("float32"))
    images = _images(16)
    params = grain.flat(jax.jit(module.init)(jax.random.key(0), images)["params"])
    assert set(np.unique(params["blocks/layer_scale_1"])) == {np.float32(1e-5)}
    params = {name: np.asarray(x) for name, x in params.items()}
    for i in (1, 2):
        params[f"blocks/layer_scale_{i}"] = np.zeros((2, 48), np.float32)
    tokens = jax.jit(module.apply)({"params": tables.nested(params)}, images)
    positions = params["position_embed"]
    patches = images.reshape(2, 2, 8, 2, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, -1)
    patches = patches @ params["patch_embed/kernel"] + params["patch_embed/bias"] + positions[1:]
    whole = lambda rows: np.broadcast_to(rows, (2, *rows.shape))
    token = whole(params["class_token"][None] + positions[:1])
    expected = np.concatenate([token, whole(params["registers"]), patches], axis=1)
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    foreign.close(np.asarray(tokens), norm(expected))
    assert module.leading_tokens(tower) == 3
    assert optim.layer_scales({"image": tables.nested(params)}, 0.5)["image"]["registers"] == 0.125


def test_flops_count_what_the_options_add():
    """17 tokens of width 32: registers, the gate of an MLP of 64; 2 layers."""
    count = lambda **changes: flops.per_image(tiny.config(**tiny.TWO_TOWERS | changes)).image
    width, mlp, depth = 32, 64, 2
    tokens = 1 + (16 // tiny.config().model.image.patch_size) ** 2
    of_token = 2 * depth * width * (4 * width + 2 * mlp)
    pairs = lambda n: 2 * 2 * depth * n * n * width
    plain = count()
    assert count(model__image__mlp="gated") - plain == 2 * depth * tokens * width * mlp
    added = 3 * of_token + pairs(tokens + 3) - pairs(tokens)
    assert count(model__image__registers=3) - plain == added
    assert count(model__image__rope="centres", model__image__layer_scale=True) == plain


@pytest.mark.parametrize("side,leading,grid", [(7, 1, 3), (4, 0, 7), (14, 1, 6), (5, 1, 1), (2, 0, 3)])
def test_positions_are_resized_as_by_transformers(side, leading, grid):
    """With CLIP's class token, and without one as SigLIP."""
    rng = np.random.default_rng(side)
    positions = rng.normal(size=(leading + side**2, 6)).astype(np.float32)
    name = ("Siglip", "CLIP")[leading]
    config = getattr(transformers, f"{name}VisionConfig")
    config = config(hidden_size=6, num_attention_heads=1, image_size=2 * side, patch_size=2)
    modeling = (modeling_siglip, modeling_clip)[leading]
    module = getattr(modeling, f"{name}VisionEmbeddings")(config)
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
    module = vit.ImageTransformer(_tower(image_size=32, position_init=position_init), jnp.dtype("float32"))
    init = jax.jit(module.init)
    same, other = (init(jax.random.key(0), _images(size)) for size in (32, 24))
    jax.tree.map(np.testing.assert_array_equal, same, other)
    assert grain.flat(same["params"])["position_embed"].shape == (17, 48)
    with pytest.raises(errors.UserError, match="image: got 36 x 36 pixels, expected a square of"):
        module.apply(same, _images(36))
    with pytest.raises(errors.UserError, match="got 24 x 32 pixels"):
        module.apply(same, _images(32)[:, :24])
