"""The derivatives of `models/layers.py` and `placement.lookup`, against others'; and what a block keeps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from grain_jax.models import layers, placement, tower_layer, vit
from grain_jax.train import sharding
from tests import tiny

pytestmark = pytest.mark.quick


@pytest.fixture
def draw():
    rng = np.random.default_rng(0)
    return lambda *shape: rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_layer_norm_and_its_gradients_are_torchs(draw, monkeypatch, on_gpu):
    monkeypatch.setattr(placement, "on_gpu", lambda: on_gpu)
    x, dy, scale, bias = 2 * draw(3, 5, 24) + 4, draw(3, 5, 24), draw(24), draw(24)
    variables = {"params": {"scale": scale, "bias": bias}}
    y, backward = jax.vjp(lambda v, x: layers.LayerNorm(1e-6).apply(v, x), variables, x)
    d_variables, dx = backward(jnp.asarray(dy))
    theirs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, scale, bias)]
    expected = torch.nn.functional.layer_norm(theirs[0], (24,), *theirs[1:], eps=1e-6)
    expected.backward(torch.tensor(dy, dtype=torch.float64))
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    ours = (dx, d_variables["params"]["scale"], d_variables["params"]["bias"])
    for got, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, wanted.grad.numpy(), rtol=1e-5, atol=1e-5)


def test_moments_keep_their_digits_in_one_pass(draw):
    x = draw(50, 197) + 1000 * (np.arange(197) == 0) + np.logspace(-3, 4, 50)[:, None]
    x = x.astype(np.float32)
    mean, variance = jax.jit(layers._moments)(x)
    np.testing.assert_allclose(mean, x.mean(1, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(variance, x.var(1, dtype=np.float64), rtol=1e-5)


def test_on_a_single_cpu_a_dense_layer_multiplies_matrices(draw):
    x, d = draw(3, 5, 8), draw(3, 5, 2, 4)
    normal, dtype = nn.initializers.normal(1.0), np.dtype("float32")
    heads = ("heads", "head_dim")
    layer = layers.dense((2, 4), ("width",), heads, dtype=dtype, kernel_init=normal)
    kernel = draw(8, 2, 4)
    gradients = lambda kernel, x: jax.vjp(
        lambda k, x: layer.apply({"params": {"kernel": k, "bias": jnp.ones((2, 4))}}, x), kernel, x
    )[1](jnp.asarray(d))
    with placement.on(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), ("data",)):
        text = str(jax.make_jaxpr(gradients)(kernel, x))
        d_kernel, dx = gradients(kernel, x)
    assert set(re.findall(r"f32\[([\d,]+)\] = dot_general", text)) == {"15,8", "8,8"}
    wide = [a.astype(np.float64) for a in (x, kernel, d)]
    np.testing.assert_allclose(d_kernel, np.einsum("ble,blkh->ekh", wide[0], wide[2]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum("blkh,ekh->ble", wide[2], wide[1]), rtol=1e-5, atol=1e-5)


def test_layer_norm_is_flaxs_bit_for_bit(draw):
    x = jnp.asarray(draw(2, 7, 16) * 30 + 100, jnp.bfloat16)
    variables = {"params": {"scale": draw(16), "bias": draw(16)}}
    flax = nn.LayerNorm(epsilon=1e-5, dtype=jnp.bfloat16, use_fast_variance=False)
    np.testing.assert_array_equal(
        jax.jit(layers.LayerNorm(1e-5).apply)(variables, x), jax.jit(flax.apply)(variables, x)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_softmax_and_its_gradient_are_jaxs(draw, dtype, tolerance):
    logits, d = jnp.asarray(draw(4, 9) * 5), jnp.asarray(draw(4, 9), dtype)
    weights, backward = jax.vjp(lambda x: layers.softmax(x, jnp.dtype(dtype)), logits)
    expected, expected_backward = jax.vjp(lambda x: jax.nn.softmax(x).astype(dtype), logits)
    np.testing.assert_array_equal(weights, expected)
    np.testing.assert_allclose(*backward(d), *expected_backward(d), atol=tolerance)


def test_dropout_depends_on_the_example_and_the_site_and_keeps_the_mean():
    keys, x = jax.random.split(jax.random.key(0), 2), jnp.ones((2, 50, 40))
    first, second = (np.asarray(layers.example_dropout(x, keys, site, 0.2)) for site in (0, 1))
    masks = [np.isclose(y, 1.25) for y in (*first, *second)]
    assert {*np.unique(first), *np.unique(second)} == {0, 1.25}
    np.testing.assert_allclose([mask.mean() for mask in masks], 0.8, atol=0.04)
    for i, a in enumerate(masks):  # two masks are independent: both keep 0.8 x 0.8
        for b in masks[:i]:
            assert (a & b).mean() == pytest.approx(0.64, abs=0.05)
    again = layers.example_dropout(x[1:], keys[1:], 0, 0.2)  # alone in its batch
    np.testing.assert_array_equal(again[0], first[1])
    np.testing.assert_array_equal(layers.example_dropout(x, None, 0, 0.2), x)


def test_what_an_image_block_keeps_for_the_backward_pass():
    """In bfloat16: inputs of norms and products, attention weights; the widest array once, not four times."""
    tower = tiny.config(dtype="bfloat16").model.image
    dtype, x = jnp.dtype("bfloat16"), jnp.ones((4, 17, tower.width), jnp.bfloat16)
    block = tower_layer.TowerLayer(tower, dtype, vit._inits(tower), qk_norm=tower.qk_norm)
    variables = jax.jit(block.init)(jax.random.key(0), x)
    _, backward = jax.vjp(lambda x: block.apply(variables, x)[0], x)
    kept = [a for a in jax.tree.leaves(backward) if a.ndim >= 3 and a.shape[0] == 4]
    # All but the rows' statistics.
    assert all(a.dtype == jnp.bfloat16 for a in kept if a.shape[-1] != tower.heads)
    shapes = [a.shape for a in kept]
    assert shapes.count((4, 17, tower.mlp_dim)) == 1
    assert shapes.count((4, tower.heads, 17, 17)) == 1
    # The block's input, the second norm's, the first product's; q, k, v, normed q and k, attended values.
    assert sum(a.size == x.size for a in kept) <= 9


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_the_gradient_of_a_lookup_is_numpys_and_is_summed_in_the_dtype(draw, dtype, tolerance, axes):
    ids = np.random.default_rng(1).integers(0, 4, (8, 500))  # a thousand positions of each of four tokens
    table, d = draw(12, 8), draw(8, 500, 8)
    mesh = tiny.mesh(**axes) if axes else None

    def gradient(table, ids, d):
        with placement.on(mesh, sharding.BATCH_AXES if axes else ()):
            rows, backward = jax.vjp(lambda x: placement.lookup(x, ids, jnp.dtype(dtype)), table)
            return rows, *backward(d)

    cut = mesh and NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    program = jax.jit(gradient, in_shardings=(cut, None, None)).lower(table, ids, d)
    rows, gradient_of_table = program.compile()(table, ids, d)
    expected = np.zeros(table.shape)
    np.add.at(expected, ids, d.astype(np.float64))
    np.testing.assert_array_equal(rows, table[ids])
    tolerance = (tolerance if axes else 1e-6) * np.abs(expected).max()
    np.testing.assert_allclose(gradient_of_table, expected, rtol=0, atol=tolerance)
    summed = {"float32": "tensor<12x8xf32>", "bfloat16": "tensor<12x8xbf16>"}[dtype]
    sums = re.findall(r"all_reduce.*?-> (tensor<\S+>)", program.as_text(), re.DOTALL)
    assert sums == ([summed] if axes else [])
