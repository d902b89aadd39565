import numpy as np
import pytest

from grain_jax.input_pipeline import order

pytestmark = pytest.mark.quick


def shards(*lengths):
    return [order.ShardFile(f"s{i}", n) for i, n in enumerate(lengths)]


def test_hashes_never_change():
    # Written down once: another value would reorder every run that resumes.
    assert int(order.hash_key(1, 2, 3)[0]) == 74078413316773926
    assert order.permutation(order.hash_key(0), 8).tolist() == [6, 7, 2, 5, 3, 4, 0, 1]
    draws = order.uniforms(order.hash_key(7), np.array([0, 10**9]), 2)
    expected = [
        ["0x1.af2e620000000p-1", "0x1.c729a40000000p-1"],
        ["0x1.bf86980000000p-1", "0x1.5a6f280000000p-3"],
    ]
    assert [list(map(float.hex, row)) for row in draws.tolist()] == expected


def test_a_position_is_found_in_its_block():
    lane = order.Lane(2, shards(3, 5, 4, 1, 6), shards_per_block=2, seed=9)
    assert [len(b) for b in lane.blocks] == [2, 2, 1] and lane.num_records == 19
    stream = []
    for ordinal in range(9):
        block = lane.block(ordinal)
        assert block.first_position == len(stream)
        records = [(s.path, i) for s in block.shards for i in range(s.num_records)]
        for position, record in enumerate(block.permutation, block.first_position):
            assert lane.ordinal(position) == ordinal
            stream.append(records[record])
    everything = [(s.path, i) for b in lane.blocks for s in b for i in range(s.num_records)]
    for epoch in range(3):
        assert sorted(stream[epoch * 19 : epoch * 19 + 19]) == sorted(everything)


def test_shards_go_round_the_lanes():
    lanes = order.make_lanes(shards(1, 0, 2, 3, 4), name="x", lanes=2, shards_per_block=1, seed=0)
    paths = [[s.path for block in lane.blocks for s in block] for lane in lanes]
    assert paths == [["s0", "s3"], ["s2", "s4"]]
