import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from grain_jax.models import placement
from grain_jax.terms import prototypes
from grain_jax.training import sharding
from tests import tiny
from tests.terms import linear

PRODUCTS = prototypes.Products("float32")


def _random(images=16, n=3, k=24, d=8):
    rng = np.random.default_rng(0)
    unit = lambda *shape: (x := rng.normal(size=shape)) / np.linalg.norm(x, axis=-1, keepdims=True)
    embedded = [
        prototypes.Embedded(*(jnp.float32(unit(*shape)) for shape in ((images, n, d), (k, d))))
        for _ in range(2)
    ]
    weight = rng.random((images, n)).astype(np.float32) * (rng.random((images, n)) < 0.8)
    return *embedded, weight, rng.normal(0, 0.1, k).astype(np.float32), np.float32(0.05)


def _grads(options, *arguments):
    def total(student):
        found = prototypes.compare(options, PRODUCTS, student, *arguments[1:])
        return jnp.sum(found.loss * jnp.arange(1.0, 1 + len(found.loss))), found

    return jax.jit(jax.value_and_grad(total, has_aux=True))(arguments[0])


def test_tiles_change_nothing():
    whole, *others = (_grads(prototypes.Options(tile=tile), *_random()) for tile in (48, 1, 7))
    assert max(linear.worst(found, whole) for found in others) < 1e-6


def test_products_of_bfloat16_are_of_bfloat16_in_the_gradient_too():
    """All of default precision, since "highest" would be several passes; values near those of float32."""
    options, arguments = prototypes.Options(tile=48), _random()

    def of(dtype):
        def total(student, *rest):
            products = prototypes.Products(dtype)
            return prototypes.compare(options, products, student, *rest).loss.sum()

        return jax.grad(total)

    text = str(jax.make_jaxpr(of("bfloat16"))(*arguments))
    kind = dict(re.findall(r"\b(\w+):(\w+)\[", text))
    operands = re.findall(r"dot_general\[.*?\n *\] (\w+) (\w+)", text, re.DOTALL)
    kinds = sorted((kind[a], kind[b]) for a, b in operands)
    assert kinds == [("bf16", "bf16")] * 6 + [("f32", "f32")]  # and the sum of distributions
    assert "HIGHEST" not in text
    assert str(jax.make_jaxpr(of("float32"))(*arguments)).count("HIGHEST") >= 6
    assert (
        linear.worst(jax.jit(of("bfloat16"))(*arguments), jax.jit(of("float32"))(*arguments)) < 0.02
    )


@pytest.mark.parametrize("shape", (pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)))
def test_meshes_change_nothing(shape):
    """Losses and gradients, also of the prototypes and of a head whose maps lie on several devices."""
    options = prototypes.Options(prototypes=24, hidden=32, bottleneck=8, tile=5)
    head = prototypes.Head(options, "float32")
    _, teacher, *rest = _random()
    x = np.random.default_rng(1).normal(size=(16, 3, 12)).astype(np.float32)
    boxed = jax.eval_shape(lambda: head.init(jax.random.key(0), x))
    params = linear.perturbed(sharding.unbox(boxed))

    def total(params, x):
        student = head.apply(params, x)
        found = prototypes.compare(options, PRODUCTS, student, teacher, *rest)
        return jnp.sum(found.loss * jnp.arange(1.0, 17)), found

    def found(places=None):
        of = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), in_shardings=places)
        return of(params, x)

    expected = found()
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    _, places = sharding.place_state(boxed, tiny.config().sharding, mesh)
    with placement.on(mesh, sharding.BATCH_AXES):
        assert linear.worst(found((places, sharding.batch_sharding(mesh))), expected) < 2e-6


@pytest.mark.parametrize("devices,iterations", ((1, 1), (4, 3)))
def test_sinkhorn(devices, iterations):
    """Rows that lie on several devices, and in tiles, against SwAV's algorithm on the whole matrix in float64."""
    _, teacher, *_ = _random(n=1, k=10)
    rows, centres, temperature = teacher.rows[:, 0], teacher.prototypes, 0.04

    def assign(rows, names):
        centre = prototypes.sinkhorn_centre(
            prototypes.Embedded(rows, centres),
            jnp.float32(temperature),
            iterations=iterations,
            names=names,
            products=PRODUCTS,
            tile=3,
        )
        return jax.nn.softmax((rows @ centres.T - centre) / temperature)

    of = lambda rows: assign(rows, ())
    if devices > 1:
        mesh, by = Mesh(np.array(jax.devices()[:devices]), ("ring",)), PartitionSpec("ring")
        of = lambda rows: assign(rows, ("ring",))
        of = jax.shard_map(of, mesh=mesh, in_specs=by, out_specs=by, check_vma=False)
    found = jax.jit(of)(rows)
    q = np.exp(np.asarray(rows, np.float64) @ np.asarray(centres, np.float64).T / temperature)
    for _ in range(iterations):
        q /= q.sum(0, keepdims=True)
        q /= q.sum(1, keepdims=True)
    np.testing.assert_allclose(found, q, atol=2e-6)


def test_sinkhorn_does_not_overflow():
    """exp(100) is no float32."""
    _, teacher, *_ = _random(n=1, k=10)
    of = functools.partial(
        *(prototypes.sinkhorn_centre, teacher._replace(rows=teacher.rows[:, 0])),
        **dict(iterations=3, names=(), products=PRODUCTS, tile=100),
    )
    assert np.isfinite(jax.jit(of)(jnp.float32(0.01))).all()


def test_memory_does_not_grow_with_the_rows():
    """The logits of 512 images are 16 times those of a tile, and never in memory at once."""
    options = prototypes.Options(tile=32)
    k, d, peaks = 4096, 8, []
    for images in (64, 512):
        shape = lambda *x: jax.ShapeDtypeStruct(x, jnp.float32)
        embedded = prototypes.Embedded(shape(images, 1, d), shape(k, d))

        def total(student, *rest):
            return prototypes.compare(options, PRODUCTS, student, *rest).loss.sum()

        step = jax.jit(jax.grad(total)).lower(
            embedded, embedded, shape(images, 1), shape(k), shape()
        )
        peaks.append(step.compile().memory_analysis().temp_size_in_bytes)
    logits = 512 * k * 4
    assert peaks[1] - peaks[0] < 0.05 * logits and peaks[1] < 0.6 * logits
