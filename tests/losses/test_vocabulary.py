"""Cross-entropy over tiles of the vocabulary against a float64 replica with all logits, and what it holds in memory."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax.launch import hlo
from grain_jax.losses import vocabulary
from grain_jax.training import flops, sharding

N, E, V = 24, 8, 50  # tokens, width, rows of the table


class _Problem(NamedTuple):
    features: np.ndarray
    table: np.ndarray
    targets: np.ndarray
    cotangent: np.ndarray  # 0 for some tokens


def _problem(scale=1.0, size=V, rows=V):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    cotangent = np.where(rng.random(N) < 0.3, 0, normal(N))
    features, table = scale * normal(N, E), normal(rows, E)
    targets = rng.integers(0, size, N).astype(np.int32)
    targets[: N // 3] = (features[: N // 3] @ table[:size].T).argmax(1)  # right answers, too
    return _Problem(features, table, targets, cotangent.astype(np.float32))


def _exact(problem, smoothing=0.0, size=V):
    """(loss, highest, own, gradients of features and table, derivatives by the logits) in float64."""
    x, w, cotangent = (np.asarray(a, np.float64) for a in (problem[0], problem[1], problem[3]))
    logits = x @ w[:size].T
    highest = logits.max(1)
    log_p = logits - highest[:, None]
    log_p -= np.log(np.exp(log_p).sum(1))[:, None]
    wanted = (1 - smoothing) * np.eye(size)[problem.targets] + smoothing / size
    own = np.take_along_axis(logits, problem.targets[:, None], 1)[:, 0]
    share = np.zeros((len(x), len(w)))
    share[:, :size] = cotangent[:, None] * (np.exp(log_p) - wanted)
    return -(wanted * log_p).sum(1), highest, own, share @ w, share.T @ x, share


def _value_and_pull(problem, places=None, **options):
    """What `cross_entropy` gives, and the gradients of the losses by the cotangents."""

    def run(features, table, targets, cotangent):
        of = lambda *x: vocabulary.cross_entropy(*x, targets, **options)
        found, pull = jax.vjp(of, features, table)
        # What comes back to the logits is of no effect.
        back = vocabulary.CrossEntropy(cotangent, *[jnp.ones_like(cotangent)] * 2)
        return (*found, *pull(back))

    return jax.jit(run, in_shardings=places)(*problem)


def _assert_equal(got, expected):
    """Numbers of tokens within 1e-6 of the largest logit, gradients within 1e-5 of their largest value."""
    logit = np.abs(expected[1]).max()
    names = ("loss", "highest", "own", "features", "table")
    for name, a, b in zip(names, got, expected[:5], strict=True):
        far = 1e-5 * np.abs(b).max() if name in names[3:] else 1e-6 * logit
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=far, err_msg=name)
    assert ((got[2] >= got[1]) == (expected[2] >= expected[1])).all()


@pytest.mark.parametrize("smoothing,size", [(0.0, V), (0.1, V), (0.1, 41), (0.0, 1)])
@pytest.mark.parametrize(
    "tile", [7, *(pytest.param(x, marks=pytest.mark.slow) for x in (25, 50)), 4096]
)
def test_values_and_gradients_equal_those_of_all_logits(tile, smoothing, size):
    """Tiles that do and do not divide the table, one that is larger than it; rows that are padding."""
    problem = _problem(size=size)
    got = _value_and_pull(problem, tile=tile, smoothing=smoothing, size=size)
    _assert_equal(got, _exact(problem, smoothing, size))
    assert not np.any(got[4][size:]) and not np.any(got[3][problem.cotangent == 0])


def test_tiles_are_whole_lanes():
    """Of 300 rows in tiles of at most 128 the last one begins at 172, in the one before."""
    problem = _problem(size=300, rows=300)
    options = dict(tile=128, smoothing=0.1)
    _assert_equal(_value_and_pull(problem, **options), _exact(problem, 0.1, 300))
    text = jax.jit(functools.partial(vocabulary.cross_entropy, **options)).lower(*problem[:3])
    assert f"tensor<{N}x128xf32>" in text.as_text()


def test_large_logits():
    """Of some hundreds: exp of them is no float32, and the derivatives are 0 or 1."""
    problem = _problem(scale=100)
    got = _value_and_pull(problem, tile=7, smoothing=0.1)
    expected = _exact(problem, 0.1)
    assert expected[1].max() > 500 and all(np.isfinite(x).all() for x in got)
    _assert_equal(got, expected)


@functools.cache
def _mesh(shape):
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, ("data", "fsdp", "tensor"))


def _options(shape, **more):
    return dict(mesh=_mesh(shape), batch_axes=sharding.BATCH_AXES, **more)


def _places(mesh, table=("tensor", "fsdp")):
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    by_batch = place(sharding.BATCH_AXES)
    return by_batch, place(*table), by_batch, by_batch


BETWEEN = [((2, 1, 1), ()), ((2, 2, 2), ()), ((2, 2, 2), ("tensor",))]


@pytest.mark.parametrize(
    "shape,table",
    [
        ((1, 1, 1), ()),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in BETWEEN),
        ((2, 2, 2), ("tensor", "fsdp")),
        ((1, 1, 8), (None, "tensor")),
    ],
)
def test_equal_on_every_mesh(shape, table):
    """Wherever the table lies; 8 does not divide its rows, and two devices of `tensor` have padding alone."""
    size = 41 if shape[2] == 2 else 36
    problem = _problem(size=size)
    options = _options(shape, tile=7, smoothing=0.1, size=size)
    got = _value_and_pull(problem, _places(_mesh(shape), table), **options)
    _assert_equal(got, _exact(problem, 0.1, size))


def test_a_width_that_does_not_divide_is_gathered_whole():
    problem = _problem()
    narrow = problem._replace(features=problem.features[:, :7], table=problem.table[:, :7])
    got = _value_and_pull(narrow, _places(_mesh((1, 4, 2)), ()), **_options((1, 4, 2), tile=7))
    _assert_equal(got, _exact(narrow))


def test_micro_batches_recomputed_in_the_backward_pass():
    """The sum over a scan of parts, each in `jax.checkpoint`, on 8 devices; tokens [..., L] of rows."""
    problem, mesh = _problem(), _mesh((2, 2, 2))
    options = _options((2, 2, 2), tile=25)
    parts = lambda x: x.reshape(2, 4, 3, *x.shape[1:])
    features, targets, weights = map(parts, (problem[0], problem[2], problem[3]))

    def total(features, table):
        @jax.checkpoint
        def one(total, part):
            features, targets, weights = part
            found = vocabulary.cross_entropy(features, table, targets, **options)
            return total + jnp.sum(found.loss * weights), found.loss

        return jax.lax.scan(one, jnp.float32(0), (features, targets, weights))

    by = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))
    run = jax.jit(jax.grad(total, (0, 1), has_aux=True), in_shardings=(by, _places(mesh)[1]))
    (of_features, of_table), loss = run(features, problem.table)
    expected = _exact(problem)
    np.testing.assert_allclose(loss.reshape(-1), expected[0], rtol=1e-6, atol=1e-6)
    of_features = of_features.reshape(N, E)
    for a, b in ((of_features, expected[3]), (of_table, expected[4])):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("tokens", [0, N])
def test_no_targets_that_count(tokens):
    """Without a weight also those that are no token have a finite loss and no gradient."""
    problem = _Problem(*(x[:tokens] if n != 1 else x for n, x in enumerate(_problem())))
    targets = np.where(np.arange(tokens) % 2, problem.targets, -1).astype(np.int32)
    problem = problem._replace(targets=targets, cotangent=np.zeros(tokens, np.float32))
    loss, _, own, *gradients = _value_and_pull(problem, tile=7, smoothing=0.1)
    assert np.isfinite(loss).all() and not np.any(own[::2])
    assert not any(np.any(x) for x in gradients)


def test_bfloat16():
    """The table is rounded to bfloat16, and in the backward pass the derivative by each logit."""
    problem = _problem()
    rounded = problem._replace(
        features=problem.features.astype(jnp.bfloat16), table=problem.table.astype(jnp.bfloat16)
    )
    loss, highest, own, share = (_exact(rounded, 0.1)[n] for n in (0, 1, 2, 5))
    got = _value_and_pull(
        rounded._replace(table=problem.table), _places(_mesh((2, 2, 2))),
        **_options((2, 2, 2), tile=7, smoothing=0.1),
    )  # fmt: skip
    assert [x.dtype for x in got] == [*[jnp.float32] * 3, jnp.bfloat16, jnp.float32]
    for a, b in zip(got[:3], (loss, highest, own)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    x, w = (np.asarray(a, np.float64) for a in rounded[:2])
    half = 2.0**-8  # largest relative error of rounding
    of_features, of_table = share @ w, share.T @ x
    far = half * (np.abs(share) @ np.abs(w) + np.abs(of_features))  # it is rounded, too
    assert (np.abs(np.asarray(got[3], np.float64) - of_features) <= 1.01 * far).all()
    # Rounded are the softmax, the sum of each device and that of them all.
    assert (np.abs(got[4] - of_table) <= 3.03 * half * (np.abs(share).T @ np.abs(x))).all()


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_products(shape):
    """One of a forward pass and three of a backward pass, of all devices together, are counted."""
    # Tiles that divide the part of a device.
    options = _options(shape, tile=5) if shape else dict(tile=25)
    of = lambda *x: vocabulary.cross_entropy(*x, **options).loss.sum()
    problem, product = _problem()[:3], 2 * N * E * V
    assert flops.matmul_flops(of, *problem) == product
    assert flops.matmul_flops(jax.grad(of, (0, 1)), *problem) == 4 * product


# No other product of sizes has these primes.
TOKENS, ROWS, WIDTH, TILE = 4 * 37, 2 * 509, 2 * 13, 127


def test_logits_are_never_in_memory_and_never_travel():
    """The compiled gradient on 8 devices: no array of tokens x rows, and no collective in the loops."""
    shape = (2, 2, 2)
    options = _options(shape, tile=TILE, smoothing=0.1)

    def total(features, table, targets, weights):
        found = vocabulary.cross_entropy(features, table, targets, **options)
        return jnp.sum(found.loss * weights), found

    places = _places(_mesh(shape))
    of = lambda kind, *shape: jax.ShapeDtypeStruct(shape, kind)
    features, table = of(jnp.bfloat16, TOKENS, WIDTH), of(jnp.float32, ROWS, WIDTH)
    tokens = of(jnp.int32, TOKENS), of(jnp.float32, TOKENS)
    run = jax.jit(
        jax.value_and_grad(total, (0, 1), has_aux=True),
        in_shardings=places,
        out_shardings=(None, places[:2]),
    )
    module = hlo.parse(run.lower(features, table, *tokens).compile().as_text())
    here, of_device = TOKENS // 4, ROWS // 2
    arrays, sent = [], []
    for computation in module.computations.values():
        for i in computation.instructions.values():
            sizes = [math.prod(x.dims) for x in i.shapes]
            arrays += sizes
            if i.opcode.startswith(("all-", "reduce-scatter", "collective-permute")):
                sent.append((i.opcode, sum(sizes), module.times[computation.name]))
    assert max(arrays) == of_device * WIDTH < here * of_device
    part = of_device * WIDTH // 2
    assert sorted(sent) == sorted(
        [
            ("all-gather", 2 * part, 1),  # the table over `fsdp`, for both passes
            ("all-reduce", here, 1),  # the largest logits over `tensor`
            ("all-reduce", 3 * here, 1),  # the sums, those of the smoothing too
            ("all-reduce", 1, 1),  # the loss of this test
            ("all-reduce", here * WIDTH, 1),  # the gradient of the features over `tensor`
            ("reduce-scatter", part, 1),  # that of the table over `fsdp`
            ("all-reduce", part, 1),  # and over `data`
        ]
    )
