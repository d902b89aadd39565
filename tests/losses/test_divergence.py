"""The streamed divergence against a float64 replica of the whole matrices, and what its compiled form holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec

from grain_jax.losses.divergence import Side, divergences
from grain_jax.losses.ring import Ring
from grain_jax.losses.streaming import IdSet

M, K, D, DT = 14, 9, 16, 12  # rows and columns a device, widths of student and teacher
SCALES = 12.0, 25.0


def problem(devices, rows=M, columns=K, seed=0):
    """(rows, columns, cotangents of both): rows of one id, columns of two, some of each are padding."""
    rng = np.random.default_rng(seed)
    unit = lambda n, d: (x := rng.normal(size=(n, d))) / np.linalg.norm(x, axis=1, keepdims=True)
    m, k = devices * rows, devices * columns

    def side(n, ids):
        student, teacher = (unit(n, d).astype(np.float32) for d in (D, DT))
        return Side(
            student, teacher, ids, rng.integers(0, k, n).astype(np.int32), rng.random(n) < 0.8
        )

    ids = rng.integers(0, k, (k, 2)).astype(np.int32)
    given = (
        side(m, rng.integers(0, k, m).astype(np.int32)),
        side(k, IdSet(ids, rng.random(ids.shape) < 0.7)),
    )
    return given, tuple(rng.normal(size=n).astype(np.float32) for n in (m, k))


def exact(given, cotangents):
    """(divergences of rows, of columns, gradients of the student's rows, columns and scale), by torch in float64."""
    rows, columns = given
    share_one = ((rows.id[:, None, None] == columns.id.id) & columns.id.listed).any(-1)
    allowed = rows.real[:, None] & columns.real
    allowed = torch.tensor(allowed & ((rows.owner[:, None] == columns.owner) | ~share_one))
    x, y = (torch.tensor(s.student, dtype=torch.float64, requires_grad=True) for s in given)
    scale = torch.tensor(SCALES[0], dtype=torch.float64, requires_grad=True)
    a, b = (torch.tensor(s.teacher, dtype=torch.float64) for s in given)
    found = []
    for z, w, on in (
        (scale * x @ y.T, SCALES[1] * a @ b.T, allowed),
        (scale * y @ x.T, SCALES[1] * b @ a.T, allowed.T),
    ):
        some = on.any(1)
        z, w = (torch.where(on, v, -1e300)[some].log_softmax(1) for v in (z, w))
        each = torch.where(on[some], w.exp() * (w - z), 0).sum(1)
        found.append(torch.zeros(len(on), dtype=torch.float64).index_put((some,), each))
    total = sum((f * torch.tensor(c)).sum() for f, c in zip(found, cotangents))
    total.backward()
    return *(f.detach().numpy() for f in found), x.grad.numpy(), y.grad.numpy(), scale.grad.item()


def ring_of(devices, gather, slices=0):
    length = devices // gather
    loops = np.random.default_rng(0).permutation(length).reshape(slices, -1) if slices else []
    loops = tuple(tuple(loop.tolist()) for loop in loops)
    return Ring(("ring",), length, "gather" if gather > 1 else None, loops=loops)


def value_and_pull(tile, ring):
    def run(rows, columns, *cotangents):
        of = lambda x, y, scale, other: divergences(
            tile, ring, rows._replace(student=x), columns._replace(student=y), scale, other
        )
        scales = map(jnp.float32, SCALES)
        found, pull = jax.vjp(of, rows.student, columns.student, *scales)
        *gradients, of_scale, of_teacher = pull(cotangents)
        return *found, *gradients, of_scale[None], of_teacher[None]

    return run


def on_mesh(run, devices, gather):
    grid = np.array(jax.devices()[:devices]).reshape(-1, gather)
    spec = PartitionSpec(("ring", "gather"))
    mesh = jax.sharding.Mesh(grid, ("ring", "gather"))
    run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(run)


@pytest.mark.parametrize(
    "devices,gather,tile,slices",
    [
        (1, 1, 5, 0),
        (8, 2, 7, 2),
        pytest.param(2, 1, 1024, 0, marks=pytest.mark.slow),
        pytest.param(8, 1, 10, 1, marks=pytest.mark.slow),
        pytest.param(8, 8, 50, 0, marks=pytest.mark.slow),  # test_teacher_similarity gathers, too
    ],
)
def test_values_and_gradients_equal_the_whole_matrices(devices, gather, tile, slices):
    given, cotangents = problem(devices)
    run = on_mesh(value_and_pull(tile, ring_of(devices, gather, slices)), devices, gather)
    *got, of_scale, of_teacher = run(*given, *cotangents)
    *expected, expected_scale = exact(given, cotangents)
    names = "rows", "columns", "gradient of rows", "gradient of columns"
    for name, a, b, within in zip(names, expected, got, (1e-6, 1e-6, 1e-5, 1e-5), strict=True):
        np.testing.assert_allclose(b, a, atol=within * np.abs(a).max(), rtol=0, err_msg=name)
    np.testing.assert_allclose(of_scale.sum(), expected_scale, rtol=1e-5)
    assert not np.any(of_teacher)


def test_a_student_that_equals_its_teacher_costs_nothing():
    given, cotangents = problem(1)
    given = tuple(side._replace(teacher=side.student) for side in given)
    scale = jnp.float32(SCALES[0])

    @jax.jit
    def run(student):
        of = lambda x: divergences(7, Ring(), given[0]._replace(student=x), given[1], scale, scale)
        found, pull = jax.vjp(of, student)
        return *found, *pull(cotangents)

    for found in run(given[0].student):
        np.testing.assert_allclose(found, 0, atol=1e-5)


def test_memory_does_not_grow_with_the_devices():
    held = []
    for devices in (2, 8):
        given, cotangents = problem(devices, rows=256, columns=128)
        run = on_mesh(value_and_pull(32, ring_of(devices, 1)), devices, 1)
        compiled = run.lower(*given, *cotangents).compile()
        held.append(compiled.memory_analysis().temp_size_in_bytes)
    assert held[1] <= 1.05 * held[0]
