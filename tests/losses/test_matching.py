"""Matching against SciPy: 2000 recorded matrices, random masks, more regions than queries, broken costs."""

import collections

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from grain_jax.losses import matching
from grain_jax.train import sharding
from tests import tiny
from tests.paths import GOLDENS

pytestmark = pytest.mark.long

match = jax.jit(matching.match)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_golden_matrices_have_scipys_total(every):
    """Those of every fifth number of queries, and all: each number is a program of its own."""
    z = np.load(GOLDENS / "hungarian.npz")
    by_size = collections.defaultdict(list)
    for i, (n, m) in enumerate(z["shapes"]):
        by_size[int(n), 6 if max(n, m) <= 6 else 20].append(i)
    checked = 0
    for (queries, regions), members in by_size.items():
        if queries % every:
            continue
        cost = np.zeros((len(members), queries, regions), np.float32)
        mask = np.zeros((len(members), regions), bool)
        for row, i in enumerate(members):
            m = z["shapes"][i][1]
            values = z["costs_flat"][z["offsets"][i] : z["offsets"][i + 1]]
            cost[row, :, :m], mask[row, :m] = values.reshape(queries, m), True
        matched = jax.tree.map(np.asarray, match(cost, mask))
        for row, i in enumerate(members):
            valid, query = matched.valid[row], matched.query_index[row]
            assert valid.sum() == min(z["shapes"][i])
            assert len(set(query[valid])) == valid.sum()
            assert not valid[~mask[row]].any()
            total = cost[row][query[valid], np.nonzero(valid)[0]].astype(np.float64).sum()
            # Float32 cannot order sums that differ by less than its own rounding.
            assert abs(total - z["total"][i]) <= 1e-7 * max(1e-12, np.abs(cost[row]).sum()), i
            checked += 1
    assert checked == (2000 if every == 1 else 374)


@pytest.mark.parametrize("queries,regions", [(6, 3), (5, 1), (4, 9), (12, 12)])
def test_random_masks_equal_scipy(queries, regions):
    rng = np.random.default_rng(queries * 100 + regions)
    cost = rng.normal(size=(64, queries, regions)).astype(np.float32)
    mask = rng.random((64, regions)) < 0.6
    matched = jax.tree.map(np.asarray, match(cost, mask))
    for c, real, query, valid in zip(cost, mask, *matched):
        rows, columns = linear_sum_assignment(c[:, real])
        expected = np.zeros(regions, int)
        numbers = np.nonzero(real)[0][columns]
        expected[numbers] = rows
        np.testing.assert_array_equal(query, expected)
        np.testing.assert_array_equal(np.nonzero(valid)[0], np.sort(numbers))


@pytest.mark.quick
@pytest.mark.parametrize(
    "queries,regions,broken", [(5, 5, np.inf), (3, 5, -np.inf), (8, 8, np.nan), (7, 9, np.inf)]
)
def test_pairs_without_a_finite_cost_are_taken_only_where_nothing_else_is_left(queries, regions, broken):
    rng = np.random.default_rng(1)
    cost = rng.normal(size=(32, queries, regions)).astype(np.float32)
    bad = rng.random(cost.shape) < 0.2
    mask = np.ones((32, regions), bool)
    matched = jax.tree.map(np.asarray, match(np.where(bad, broken, cost), mask))
    for c, b, query, valid in zip(cost, bad, *matched):
        rows, columns = linear_sum_assignment(np.where(b, 1e3, c))
        numbers = np.nonzero(valid)[0]
        assert len(set(query[numbers])) == min(queries, regions)
        np.testing.assert_allclose(
            np.where(b, 1e3, c)[query[numbers], numbers].sum(),
            np.where(b, 1e3, c)[rows, columns].sum(),
            rtol=1e-5,
        )
    everything = match(np.full((1, queries, regions), broken, np.float32), mask[:1])
    assert int(everything.valid.sum()) == min(queries, regions)


@pytest.mark.quick
def test_no_regions():
    matched = match(np.zeros((2, 5, 0), np.float32), np.zeros((2, 0), bool))
    assert matched.query_index.shape == (2, 0)
    matched = match(np.zeros((2, 5, 3), np.float32), np.zeros((2, 3), bool))
    assert not matched.valid.any()


def test_large_problems_are_solved_per_device_without_collectives():
    mesh = sharding.make_mesh(tiny.config().mesh)
    by_batch = sharding.batch_sharding(mesh)
    rng = np.random.default_rng(2)
    cost = rng.normal(size=(16, 8, 8)).astype(np.float32)
    mask = rng.random((16, 8)) < 0.8
    spec = by_batch.spec
    run = jax.jit(jax.shard_map(matching.match, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    cost, mask = jax.device_put((cost, mask), by_batch)
    text = run.lower(cost, mask).compile().as_text()
    assert "while" in text
    assert not any(word in text for word in ("all-reduce", "all-gather", "collective-permute"))
    for sharded, plain in zip(run(cost, mask), match(cost, mask)):
        np.testing.assert_array_equal(sharded, plain)
