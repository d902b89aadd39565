import itertools

import pytest

from grain_jax.input_pipeline import synthetic
from tests import record_sets

pytestmark = pytest.mark.quick


def take(count, *, seed=0, captions=1, **arguments):
    config = record_sets.config("", source="synthetic", seed=seed, captions_per_image=captions, pack_rows=8)
    return list(itertools.islice(synthetic.batches(config, **arguments), count))


def test_batches_are_a_function_of_seed_and_step():
    whole = take(4)
    for got, expected in zip(take(2, start_step=2), whole[2:], strict=True):
        record_sets.assert_batches_equal(got, expected)
    parts = [take(4, lanes=lanes) for lanes in ((0, 1), (2, 3))]
    for step, expected in enumerate(whole):
        joined = record_sets.join([part[step] for part in parts])
        record_sets.assert_batches_equal(joined, expected)
    assert (whole[0].image != whole[1].image).any()
    assert (take(1, seed=1)[0].image != whole[0].image).any()
