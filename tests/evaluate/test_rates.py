import itertools

import numpy as np
import pytest
import scipy.stats

from grain_jax.evaluate import rates

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("successes, count", [(0, 1), (0, 40), (1, 1), (7, 9), (776, 1000), (50, 50)])
def test_interval_is_scipys_wilson(successes, count):
    expected = scipy.stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(rates.interval(successes, count), (expected.low, expected.high), atol=1e-12)


def test_interval_of_nothing():
    assert rates.interval(0, 0) == (0.0, 1.0)
    assert rates.rate("r1", np.array([])) == {"r1": 0.0, "r1_low": 0.0, "r1_high": 1.0}


def test_interval_of_a_mean_over_classes_is_that_of_all_where_they_are_alike():
    shares, counts = np.array([0.5, 0.75, 1.0]), np.array([40, 40, 40])
    measured = rates.mean_rate("m", shares, counts)
    assert measured["m"] == 0.75
    assert (measured["m_low"], measured["m_high"]) == pytest.approx(rates.interval(90, 120))
    # Unlike ones, of one p: it holds the mean in about 95% of the cases, also near 1.
    random = np.random.default_rng(0)
    counts = np.array([3, 5, 10, 40] * 10)
    kept = []
    for p in (0.3, 0.97):
        for _ in range(500):
            measured = rates.mean_rate("m", random.binomial(counts, p) / counts, counts)
            kept.append(measured["m_low"] <= p <= measured["m_high"])
    assert 0.93 < np.mean(kept) < 0.97


def _by_enumeration(scores, right, k):
    """The mean over all orders of the candidates of: sorted by score, is a right one among the first k?"""
    orders = list(itertools.permutations(range(len(scores))))
    first = [sorted(order, key=lambda c: -scores[c])[:k] for order in orders]
    return np.mean([any(right[c] for c in chosen) for chosen in first])


@pytest.mark.parametrize("seed", range(4))
def test_topk_hits_break_ties_at_random(seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 3, (6, 6)).astype(float)
    right = random.random((6, 6)) < 0.3
    right[np.arange(6), random.integers(6, size=6)] = True
    for k in (1, 2, 5, 9):
        expected = [_by_enumeration(s, r, k) for s, r in zip(scores, right)]
        np.testing.assert_allclose(rates.topk_hits(scores, right, k), expected, atol=1e-12)


def test_what_differs_by_rounding_ties_with_the_right_one_and_no_chain_leads_further():
    score = np.float32(0.25) + np.array([[0, 2e-7, 9e-6, 1.2e-5, -9e-6, -1.2e-5]], np.float32)
    right = np.arange(6) == np.array([[0]])
    for k, expected in ((1, 0), (2, 1 / 4), (4, 3 / 4), (5, 1)):  # one above, three tied, one below
        assert rates.topk_hits(score, right, k) == pytest.approx(expected)
    assert rates.topk_hits(score, right, 1, tie=1e-7) == 0
    assert rates.topk_hits(1e3 * score, right, 4, tie=1e3 * rates.TIE) == pytest.approx(3 / 4)
    none = np.array([[-np.inf, -np.inf, 0.0]])  # a class that has no score
    assert rates.topk_hits(none, none < -1, 1).tolist() == [0]
    assert rates.topk_hits(none, np.array([[True, False, False]]), 2) == pytest.approx(1 / 2)
