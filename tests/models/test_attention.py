"""The attention programs against a float64 replica and each other; the kernel is interpreted."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import replicas
from grain_jax import config as config_lib
from grain_jax.models import attention, attention_kernel, grain, layers, placement, rotary, text, vit
from tests import foreign, tiny

pytestmark = pytest.mark.long


CAUSAL, WITHIN = attention.CausalWithin, attention.Within
# Batch, length, heads, width of a head, norms inside, the mask of several texts in a row.
SHAPES = {
    "B/16": (1, 197, 2, 64, True, None),
    "text": (3, 77, 4, 64, False, CAUSAL),
    "SigLIP's text": (2, 64, 2, 64, False, WITHIN),
    "S/16": (4, 50, 8, 32, True, None),
    "H/14": (1, 10, 8, 80, False, None),
    "g/14": (1, 10, 3, 88, True, None),
    "tiny": (8, 17, 2, 16, True, CAUSAL),
}


def _inputs(shape):
    batch, length, heads, width, normed, texts = shape
    rng = np.random.default_rng(0)
    q, k, v, weight = rng.normal(size=(4, batch, length, heads * width))
    norms = tuple(rng.normal(size=(4, width)) + [[1], [0], [1], [0]]) if normed else None
    ids = np.sort(rng.integers(0, 4, (batch, length))) if texts is not None else None
    return (q * 2, k, v, norms), ids, weight


def _with_gradients(function, arrays, weight):
    value, pull = jax.vjp(lambda x: function(*x), arrays)
    return value, pull(weight.astype(value.dtype))[0]


def _worst(got, expected):
    """The largest difference, in parts of the largest value of its array, or of 1% of that of all."""
    got, expected = ([np.asarray(x, np.float64) for x in jax.tree.leaves(t)] for t in (got, expected))
    floor = 0.01 * max(np.abs(e).max() for e in expected)  # the gradient of the keys' bias is 0
    differences = [np.abs(a - e).max() / max(np.abs(e).max(), floor) for a, e in zip(got, expected)]
    return max(differences)


def _by_xla(q, k, v, norms, heads, eps, within):
    """As attention.Attention has it."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    if norms is not None:
        q, k = (layers._norm(x, *n, eps, False) for x, n in ((q, norms[:2]), (k, norms[2:])))
    scale, float32 = q.shape[-1] ** -0.5, jnp.float32
    scores = jnp.einsum("bqkh,bskh->bkqs", q * scale, k, preferred_element_type=float32)
    if within is not None:
        scores = jnp.where(within.mask(), scores, jnp.finfo(float32).min)
    weights = layers.softmax(scores, v.dtype)
    return jnp.einsum("bkqs,bskh->bqkh", weights, v).reshape(*v.shape[:2], -1)


BETWEEN = ("B/16", "S/16", "H/14")  # two sizes of heads, and one block of keys, lie about each


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x in BETWEEN else x for x in SHAPES]
)
def test_kernel_equals_the_replica(name):
    """Values and all gradients are as near to float64 as XLA's, in float32 and, three times, bfloat16."""
    heads, eps, kind = SHAPES[name][2], 1e-6, SHAPES[name][-1]
    arrays, ids, weight = _inputs(SHAPES[name])
    with jax.enable_x64(True):
        expected = _with_gradients(
            jax.jit(
                lambda q, k, v, norms: replicas.attention(q, k, v, heads, norms, eps, ids, kind is CAUSAL)
            ),
            jax.tree.map(jnp.asarray, arrays),
            jnp.asarray(weight),
        )
        expected = jax.tree.map(np.asarray, expected)
    within = None if ids is None else kind(jnp.asarray(ids, jnp.int32))

    def kernel(q, k, v, norms):
        return attention.with_pallas(q, k, v, heads=heads, norms=norms, eps=eps, within=within)

    def xla(q, k, v, norms):
        return _by_xla(q, k, v, norms, heads, eps, within)

    bounds = {jnp.float32: 5e-5} | ({jnp.bfloat16: 0.5} if name in ("B/16", "text", "tiny") else {})
    for dtype, bound in bounds.items():
        q, k, v, norms = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
        cast = (*(x.astype(dtype) for x in (q, k, v)), norms)
        error_of = lambda f, cast=cast, dtype=dtype: _worst(
            _with_gradients(jax.jit(f), cast, jnp.asarray(weight, dtype)), expected
        )
        ours, theirs = error_of(kernel), error_of(xla)
        assert ours < bound and ours < 2.5 * theirs, (dtype, ours, theirs)


def _loss(layer, mask, weight, rotation=None):
    """The value and the gradients of a sum of the layer's output, by parameters and input."""

    def run(params, x):
        return jnp.sum(layer.apply(params, x, x, x, mask, rotation=rotation) * weight)

    return jax.jit(jax.value_and_grad(run, (0, 1)))


@pytest.mark.parametrize(
    "program,mesh_shape,qk_norm,width,rotated",
    [
        ("pallas", None, False, 256, False),
        ("pallas", (2, 2, 2), True, 256, False),
        ("pallas", (1, 1, 8), False, 32, False),
        ("pallas", (2, 2, 2), False, 48, True),
        ("cudnn", None, True, 48, True),
    ],
)
def test_layer_is_the_same_by_each_program(monkeypatch, program, mesh_shape, qk_norm, width, rotated):
    """The same parameters and their gradients; cut by a tensor axis where that divides the heads.

    At width 256 the kernel takes queries, keys and values as the result of one product.
    """
    real = jax.nn.dot_product_attention
    of_xla = lambda *qkv, implementation, **seen: real(*qkv, implementation="xla", **seen)
    monkeypatch.setattr(jax.nn, "dot_product_attention", of_xla)  # a CPU has no cuDNN
    init, eps, heads = layers.normal(0.05 if width == 256 else 0.3), 1e-6 if qk_norm else None, 4
    x = jax.random.normal(jax.random.key(0), (8, 10, width))
    ids = jnp.sort(jax.random.randint(jax.random.key(1), (8, 10), 0, 3))
    within = None if qk_norm or rotated else attention.CausalWithin(ids)
    weight = jax.random.normal(jax.random.key(2), x.shape)
    xla, other = (
        attention.Attention(
            *(width, heads, jnp.dtype("float32"), init, init, init, eps),
            program=name,
            key_bias=not (rotated and qk_norm),
        )
        for name in ("xla", program)
    )
    mask = within and within.mask()
    params, again = (
        jax.jit(lambda layer=layer, seen=seen: layer.init(jax.random.key(3), x, x, x, seen))()
        for layer, seen in ((xla, mask), (other, within))
    )
    jax.tree.map(np.testing.assert_array_equal, params, again)

    rotation = rotary.of_grid(3, theta=100.0, head_dim=width // heads, leading=1) if rotated else None
    expected = _loss(xla, mask, weight, rotation)(params, x)
    mesh = mesh_shape and tiny.mesh(*mesh_shape)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))) if mesh else x
    with placement.on(mesh, ("data", "fsdp") if mesh else ()):
        got = _loss(other, within, weight, rotation)(params, placed)
    if not rotated:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, expected)
        return
    jax.tree.map(lambda a, b: foreign.close(np.asarray(a), np.asarray(b)), got, expected)
    unrotated = _loss(xla, None, weight)(params, x)
    assert abs(unrotated[0] - expected[0]) > 1e-2
    grads = [grain.flat(result[1][0]["params"]) for result in (expected, unrotated)]
    assert ("key/bias" in grads[0]) != qk_norm
    if not qk_norm:  # without rotation it has no gradient
        of_rotated, of_other = (np.abs(x["key/bias"]).max() for x in grads)
        assert of_rotated > 1 > 1e4 * of_other


@pytest.mark.parametrize("heads,width", [(6, 64), (8, 32), (4, 96), (2, 128)])
def test_one_array_is_the_same_as_three(heads, width):
    """Values and gradients, up to rounding; it can be taken apart again. Heads of 96 lie across tiles."""
    rng = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(rng.normal(size=(3, 2, 9, heads * width)), jnp.float32))
    norms = tuple(rng.normal(size=(4, width)).astype(np.float32))
    weight = rng.normal(size=arrays[0].shape)
    kernel = lambda *arrays: attention.with_pallas(*arrays, heads=heads, norms=norms, eps=1e-6, within=None)

    def together(*arrays):
        return kernel(attention_kernel.arranged(*arrays, heads))

    qkv = attention_kernel.arranged(*arrays, heads)
    jax.tree.map(np.testing.assert_array_equal, attention_kernel.apart(qkv, heads), arrays)
    expected = _with_gradients(kernel, arrays, weight)
    assert _worst(_with_gradients(together, arrays, weight), expected) < 1e-6


def test_heads_that_fill_no_tiles_stay_three_arrays():
    assert not attention_kernel.arranges(6, 32) and attention_kernel.arranges(6, 64)
    with placement.on(tiny.mesh(2, 1, 4), ("data",)):
        assert not attention_kernel.arranges(4, 64)  # one head per device


def _tower(kind):
    """The class and the config of a tower whose rows cuDNN does not take, and its inputs."""
    rng = np.random.default_rng(0)
    if kind.startswith("image"):  # 17 tokens; with half of the patches 9
        kept = jnp.asarray(np.sort([rng.permutation(16)[:8] for _ in range(8)]))
        model = tiny.config(model__image__patch_size=4, model__image__rope="centres").model
        args = (jnp.asarray(rng.normal(size=(8, 16, 16, 3)), jnp.float32),)
        return vit.ImageTransformer, model.image, args, dict(kept=kept) if "kept" in kind else {}
    keys = dict(model__text__causal=kind == "causal", model__text__mask_padding=kind == "masked")
    keys["text__packing"] = kind != "padding seen"
    config = tiny.config(model__text__context_length=29, **keys).model.text
    segments = np.sort(rng.integers(0, 4, (8, 2, 29)))[..., ::-1]
    positions = np.broadcast_to(np.arange(29), segments.shape)
    args = (rng.integers(1, 99, segments.shape), positions, segments)
    return text.TextTransformer, config, tuple(jnp.asarray(x, jnp.int32) for x in args), {}


@pytest.mark.parametrize("kind", ["image", "image kept", "causal", "masked", "padding seen"])
def test_towers_fill_their_rows_for_cudnn(monkeypatch, kind):
    """cuDNN has no backward pass of odd lengths; what fills a row is not seen, and does not come out."""
    lengths, real = [], jax.nn.dot_product_attention

    def stand_in(q, k, v, *, implementation, **seen):
        lengths.append(q.shape[1])
        return real(q, k, v, implementation="xla", **seen)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    tower, config, args, options = _tower(kind)
    build = lambda program: tower(config, jnp.dtype("float32"), attention=program)
    params = jax.jit(build("xla").init)(jax.random.key(3), *args)

    def loss(program):
        def run(params):
            out = build(program).apply(params, *args, **options)
            real = kind != "masked" or (args[2] > 0)[..., None]  # no one reads the features of padding
            return jnp.sum(real * jnp.sin(3 * out + jnp.arange(out.shape[-2])[:, None]))

        return jax.jit(jax.value_and_grad(run))(params)

    expected = loss("xla")
    for mesh in (None, tiny.mesh(2, 2, 2)):
        lengths.clear()
        with placement.on(mesh, ("data", "fsdp") if mesh else ()):
            got = loss("cudnn")
        assert set(lengths) == {{"image": 18, "image kept": 10}.get(kind, 32)}
        assert _worst(got, expected) < 2e-5


@pytest.mark.parametrize("masked,rate", [(False, 0.0), (True, 0.0), (False, 0.4)])
def test_few_queries_absorb_the_maps_of_keys_and_values(masked, rate):
    rng, init = np.random.default_rng(1), layers.normal(0.3)
    query, memory = (jnp.asarray(rng.normal(size=(4, n, 32)), jnp.float32) for n in (3, 40))
    mask = jnp.asarray(rng.integers(0, 2, (4, 1, 1, 40)), bool) if masked else None
    keys = jax.random.split(jax.random.key(5), 4)
    build = lambda absorbs: attention.Attention(
        32, 8, jnp.dtype("float32"), init, init, init, dropout=rate, absorbs=absorbs
    )
    params, same = (jax.jit(build(x).init)(jax.random.key(3), query, memory, memory) for x in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, params, same)

    def run(absorbs):
        out = lambda *a: jnp.sum(jnp.sin(build(absorbs).apply(a[0], a[1], a[2], a[2], mask, keys)))
        return jax.jit(jax.value_and_grad(out, (0, 1, 2)))(params, query, memory)

    got, expected = run(True), run(False)
    assert not np.asarray(nn.unbox(got[1][0])["params"]["key"]["bias"]).any()  # softmax does not see it
    assert _worst(got, expected) < 2e-5
    text_of = lambda absorbs: jax.jit(build(absorbs).apply).lower(params, query, memory, memory).as_text()
    assert "4x40x8x4" in text_of(False) and "4x40x8x4" not in text_of(True)  # keys and values


def test_auto_is_xla_without_a_mesh_and_on_a_cpu():
    bfloat16 = jnp.dtype("bfloat16")
    assert attention.choose("auto", bfloat16, 8) == "xla"
    with placement.on(tiny.mesh(), ("data",)):
        assert attention.choose("auto", bfloat16, 8) == "xla"
        assert attention.choose("pallas", bfloat16, 8) == "pallas"


def test_programs_for_rows_and_heads():
    heads_of = attention_kernel._heads_of_a_program
    shapes = (12, 64), (6, 32), (16, 80), (16, 88), (2, 16)
    assert [heads_of(*shape).lanes for shape in shapes] == [128, 192, 640, 1408, 32]
    rows = attention_kernel._rows_of_a_program
    assert [rows(128, 197, 128, 2), rows(6, 77, 128, 2), rows(32, 257, 1408, 2)] == [8, 6, 1]


def test_kernels_whose_results_are_kept_stand_in_no_loop():
    """`unroll` of the tower wins; XLA's programs, recomputed layers and deep towers are loops."""
    deep = lambda depth, unroll=0: config_lib.ImageTower(depth=depth, unroll=unroll)
    unrolled = layers.unrolled
    assert unrolled(deep(12), "none", "pallas") == 12
    assert unrolled(deep(12), "none", "xla") == unrolled(deep(12), "full", "pallas") == 1
    assert unrolled(deep(32), "none", "pallas") == 1
    assert unrolled(deep(12, 3), "none", "pallas") == 3
    with placement.on(tiny.mesh(2, 4), ("data", "fsdp")):  # gathers
        assert unrolled(deep(12), "none", "pallas") == 1
