"""The kernel of norm, MLP and residual against a float64 replica and against XLA's program, in Pallas' interpreter."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax import config as config_lib
from grain_jax.core import errors
from grain_jax.models import layers, mlp_kernel, placement, programs, tower_layer

EPS = 1e-6
AXES = ("data", "fsdp")
TOWER = config_lib.ImageTower(
    width=32, heads=2, mlp_dim=2560, depth=1
)  # three parts of 1024 at most
BFLOAT16 = jnp.dtype("bfloat16")


def _inputs(batch=4, length=17, width=32, hidden=256):
    rng = np.random.default_rng(0)
    draw = lambda scale, *shape: scale * rng.normal(size=shape)
    weights = dict(scale=1 + draw(0.1, width), bias=draw(0.1, width), b_in=draw(0.1, hidden))
    weights |= dict(w_in=draw(0.2, width, hidden), w_out=draw(0.1, hidden, width))
    weights |= dict(b_out=draw(0.1, width))
    return draw(1, batch, length, width), weights, draw(1, batch, length, width)


def _replica(x, p, activation):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    hidden = (normed * p["scale"] + p["bias"]) @ p["w_in"] + p["b_in"]
    return x + activation(hidden) @ p["w_out"] + p["b_out"]


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + jnp.exp(-1.702 * x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def _graded(function, dtype, *given):
    """Value and gradients by x and weights, of arrays of that dtype."""
    x, weights, weight = jax.tree.map(lambda a: jnp.asarray(a, dtype), given)
    value, pull = jax.vjp(function, x, weights)
    return value, *pull(weight)


def _worst(got, expected):
    """The largest difference, in parts of the largest value of its array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in pairs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_equals_the_replica(activation):
    """As near to float64 as XLA's program, in float32 and in bfloat16; more rows and hidden values than one program has."""
    arrays = _inputs(batch=10, hidden=2560 if activation == "gelu" else 256)
    with jax.enable_x64(True):
        run = lambda x, p: _replica(x, p, ACTIVATIONS[activation])
        expected = jax.tree.map(np.asarray, _graded(run, jnp.float64, *arrays))
    ours = layers.ACTIVATIONS[activation]

    def kernel(x, p):
        return mlp_kernel.half_layer(x, eps=EPS, activation=ours, **p)

    def xla(x, p):
        normed = layers._norm(x, p["scale"], p["bias"], EPS, False)
        hidden = normed @ p["w_in"].astype(x.dtype) + p["b_in"].astype(x.dtype)
        return x + ours(hidden) @ p["w_out"].astype(x.dtype) + p["b_out"].astype(x.dtype)

    for dtype, bound in {jnp.float32: 2e-6, BFLOAT16: 0.05}.items():
        errors_of_both = [
            _worst(jax.jit(lambda *g, f=f, d=dtype: _graded(f, d, *g))(*arrays), expected)
            for f in (kernel, xla)
        ]
        assert errors_of_both[0] < bound and errors_of_both[0] < 1.5 * errors_of_both[1], (
            dtype,
            errors_of_both,
        )


@pytest.mark.parametrize("mesh_shape", [None, (2, 4, 1)])
def test_layer_is_the_same_by_each_program(mesh_shape):
    """The same parameters bit for bit, the same output and gradients, on one device and cut over eight."""
    x = jax.random.normal(jax.random.key(0), (8, 5, TOWER.width))
    weight = jax.random.normal(jax.random.key(1), x.shape)
    init = layers.normal(0.1)
    inits = tower_layer.LayerInits(init, init, init, init)
    by = {
        program: tower_layer.TowerLayer(TOWER, jnp.dtype("float32"), inits, mlp_program=program)
        for program in ("xla", "pallas")
    }
    params = [
        jax.jit(lambda layer=layer: layer.init(jax.random.key(2), x))() for layer in by.values()
    ]
    jax.tree.map(np.testing.assert_array_equal, *params)

    def graded(program):
        run = lambda params, x: jnp.sum(by[program].apply(params, x)[0] * weight)
        return jax.jit(jax.value_and_grad(run, (0, 1)))(params[0], x)

    expected = graded("xla")
    mesh = None
    if mesh_shape is not None:
        mesh = Mesh(np.array(jax.devices()).reshape(mesh_shape), (*AXES, "tensor"))
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(AXES)))
    with placement.on(mesh, AXES if mesh else ()):
        got = graded("pallas")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)


def _chosen(program, tower=TOWER, dtype=BFLOAT16, length=17, remat="none"):
    return programs.of_mlp(program, dtype, tower, length=length, remat=remat)


def test_auto_is_xla_without_a_mesh_and_on_a_cpu():
    assert _chosen("auto") == "xla"
    with placement.on(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), AXES), AXES):
        assert _chosen("auto") == "xla"
        assert _chosen("pallas") == "pallas"


def test_what_auto_takes_on_a_tpu():
    """The kernel in bfloat16, with whole weights, where nothing is computed again and a row fits."""
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")

    def on(fsdp=1, tensor=1, **given):
        shape = dict(data=2, fsdp=fsdp, tensor=tensor)
        mesh: Any = types.SimpleNamespace(shape=shape, devices=np.array([tpu]))
        with placement.on(mesh, AXES):
            return _chosen("auto", **given)

    b16 = dict(tower=config_lib.ImageTower(), length=197)
    assert on(**b16) == "pallas"
    others = [dict(remat="full"), dict(length=2048), dict(fsdp=4), dict(tensor=2)]
    others += [dict(dtype=jnp.dtype("float32"))]
    assert [on(**b16 | changes) for changes in others] == ["xla"] * 5
    with programs.maps_apart():
        assert on(**b16) == "xla"


@pytest.mark.parametrize("changed", [dict(mlp="gated"), dict(layer_scale=True)])
def test_what_the_kernel_does_not_serve(changed):
    tower = dataclasses.replace(TOWER, **changed)
    with pytest.raises(errors.UserError, match="model.mlp: got pallas with a gated MLP, layer"):
        _chosen("pallas", tower)
    assert _chosen("auto", tower) == "xla"


def test_weights_must_fit_into_the_memory_of_a_core():
    """Sizes that compile, and a length that does not; v5p has two cores a device."""
    sizes = {"B/16": (768, 3072), "L/14": (1024, 4096), "g/14": (1664, 8192)}
    kinds = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "tpu7x": "TPU7x"}
    fits = lambda size, length, kind: mlp_kernel.fits(*sizes[size], length, kinds[kind])
    assert fits("B/16", 1370, "v5e") and fits("L/14", 577, "v5e") and fits("B/16", 256, "tpu7x")
    for wrong in (("B/16", 2048, "v5e"), ("B/16", 197, "v5p"), ("g/14", 257, "v5e")):
        assert not fits(*wrong), wrong
    assert not fits("L/14", 257, "tpu7x") and not fits("B/16", 577, "tpu7x")


def test_the_parts_of_the_hidden_values():
    size = lambda hidden: mlp_kernel._chunks(hidden)[0].stop
    assert [size(n) for n in (3072, 4096, 2560, 192, 5120)] == [1024, 1024, 640, 192, 1024]


def test_kernels_whose_results_are_kept_stand_in_no_loop():
    """`unroll` of the tower wins; XLA's programs, recomputed layers and deep towers are loops."""
    unrolled = programs.unrolled
    deep = lambda depth, unroll=0: dataclasses.replace(TOWER, depth=depth, unroll=unroll)
    assert (
        unrolled(deep(12), "none", "xla", "pallas")
        == unrolled(deep(12), "none", "pallas", "xla")
        == 12
    )
    assert (
        unrolled(deep(12), "none", "xla", "xla")
        == unrolled(deep(12), "full", "pallas", "pallas")
        == 1
    )
    assert unrolled(deep(32), "none", "pallas", "pallas") == 1
    assert unrolled(deep(12, 3), "none", "pallas", "pallas") == 3
    with placement.on(Mesh(np.array(jax.devices()).reshape(2, 4), AXES), AXES):  # gathers
        assert unrolled(deep(12), "none", "pallas", "pallas") == 1
