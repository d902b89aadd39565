import itertools
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grain_jax.input_pipeline import device, synthetic
from tests import record_sets


@pytest.fixture
def sharding():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    return NamedSharding(mesh, P(("data", "fsdp")))


def source(count):
    return itertools.islice(synthetic.batches(record_sets.config("", source="synthetic")), count)


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
