"""Batches of the synthetic source, and what a device is given of them, in time."""

import itertools
import threading
import time

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grain_jax.input_pipeline import device, synthetic
from tests import record_sets, tiny


@pytest.fixture
def sharding():
    return NamedSharding(tiny.mesh(2, 2, 2), PartitionSpec(("data", "fsdp")))


def source(count, *, seed=0, **arguments):
    config = record_sets.config("", source="synthetic", seed=seed)
    return itertools.islice(synthetic.batches(config, **arguments), count)


def threads():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_global_arrays_in_order_until_an_error(sharding):
    def failing():
        yield from source(3)
        raise ValueError("record 7 is damaged")

    batches = device.Prefetch(failing(), sharding)
    for expected in source(3):
        got = next(batches)
        record_sets.assert_batches_equal(got, expected)
        for field in jax.tree.leaves(got):
            assert field.sharding.is_equivalent_to(sharding, field.ndim)
        assert got.image.addressable_shards[0].data.shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="record 7 is damaged"):
        next(batches)
    assert not threads()


def test_depth_and_close(sharding):
    made, closed = [], []

    def endless():
        try:
            for batch in source(None):
                made.append(1)
                yield batch
        finally:
            closed.append(True)

    batches = device.Prefetch(endless(), sharding, depth=2)
    next(batches)
    time.sleep(0.5)
    assert len(made) <= 4  # one taken, two ready, one at the door
    batches.close()
    assert closed == [True] and not threads()
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.quick
def test_batches_are_a_function_of_seed_and_step():
    whole = [*source(4)]
    for got, expected in zip(source(2, start_step=2), whole[2:], strict=True):
        record_sets.assert_batches_equal(got, expected)
    parts = [[*source(4, lanes=lanes)] for lanes in ((0, 1), (2, 3))]
    for step, expected in enumerate(whole):
        joined = record_sets.join([part[step] for part in parts])
        record_sets.assert_batches_equal(joined, expected)
    assert (whole[0].image != whole[1].image).any()
    assert (next(source(1, seed=1)).image != whole[0].image).any()
