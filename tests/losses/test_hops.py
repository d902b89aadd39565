"""The path of the ring through a slice: on TPUs that are not here, and with the numbers of another order."""

import itertools
import types

import jax
import numpy as np
import pytest

from grain_jax import config as config_lib
from grain_jax.losses import hops, layout


def _chip(coords, slice_index=0, core=0):
    return types.SimpleNamespace(platform="tpu", coords=coords, slice_index=slice_index, core_on_chip=core)


def _chips(*sizes, slice_index=0):
    return [_chip(c, slice_index) for c in itertools.product(*map(range, sizes))]


def _steps(chips, order):
    """How many links each hop of the ring takes in a grid without wrap-around."""
    pairs = zip(order, (*order[1:], order[0]))
    return [sum(abs(a - b) for a, b in zip(chips[i].coords, chips[j].coords)) for i, j in pairs]


@pytest.mark.parametrize(
    "sizes", [(2, 2, 1), (8, 8, 1), (16, 16, 1), (2, 4, 1), (3, 4, 1), (4, 4, 4), (2, 2, 4), (3, 3, 2)]
)
def test_every_hop_is_a_link(sizes):
    chips = _chips(*sizes)
    np.random.default_rng(0).shuffle(chips)
    order = hops.along_links(np.array([chips], object))
    assert sorted(order) == list(range(len(chips)))
    assert set(_steps(chips, order)) == {1}


def test_every_hop_is_a_link_where_a_chip_is_two_devices():
    """On Ironwood: to the other half of the chip, or over a link; no link carries two hops one way."""
    devices = [_chip(c, core=core) for c in np.ndindex(4, 4, 4) for core in (0, 1)]
    order = hops.along_links(np.array([devices], object))
    assert sorted(order) == list(range(128))
    pairs = [(devices[i].coords, devices[j].coords) for i, j in zip(order, order[1:] + order[:1])]
    steps = [sum(abs(a - b) for a, b in zip(*pair)) for pair in pairs]
    assert set(steps) == {0, 1}
    links = [pair for pair, step in zip(pairs, steps) if step]
    assert len(links) == len(set(links))


def test_the_path_goes_slice_by_slice():
    chips = [*_chips(2, 2, 1), *_chips(2, 2, 1, slice_index=1)]
    np.random.default_rng(0).shuffle(chips)
    path = hops.along_links(np.array([chips], object))
    assert [chips[i].slice_index for i in path] == [0] * 4 + [1] * 4
    assert all(set(_steps(chips, loop)) == {1} for loop in (path[:4], path[4:]))
    assert hops.along_links(np.array([chips[:7]], object)) == ()


@pytest.mark.parametrize(
    "rings",
    [
        [[types.SimpleNamespace(id=i) for i in range(4)]],  # no coordinates: CPUs and GPUs
        [_chips(3, 3, 1)],  # an odd number has no closed path
        [[*_chips(2, 2, 1)[:3], _chip((4, 4, 0))]],  # no full grid
        [_chips(2, 2, 1), [_chips(2, 2, 1)[i] for i in (0, 3, 1, 2)]],  # one order for two rings
    ],
)
def test_without_a_path_they_go_as_they_lie(rings):
    assert hops.along_links(np.array(rings, object)) == ()


@pytest.mark.parametrize(
    "tensor,group_size,gather,longest",
    [
        (1, 0, 1, 1),
        (1, 512, 1, 1),  # groups of 16 chips: two rows of the slice
        (1, 0, 2, 2),  # every second chip of a row
        (2, 0, 1, 2),
    ],
)
def test_rings_of_a_slice(tensor, group_size, gather, longest):
    """The rings of a batch of 32 images a shard on 8 x 8 chips, laid row by row."""
    shards = 64 // tensor
    placed = layout.make_layout(shards * 32, config_lib.Loss(group_size=group_size, gather=gather), shards)
    chips = np.empty(64, object)
    chips[:] = _chips(8, 8, 1)
    grid = chips.reshape(*placed.sizes, -1)
    placed = placed.on(grid, "high")
    assert placed.everywhere.precision == jax.lax.Precision.HIGH
    for gathered, rest in np.ndindex(grid.shape[2:]):
        ring = grid[:, :, gathered, rest].ravel()
        assert max(_steps(ring, placed.everywhere.path)) == longest
        for group in grid[:, :, gathered, rest] if group_size else ():
            assert max(_steps(group, placed.in_group.path)) == longest


def test_precision_is_that_of_tpus():
    unplaced = layout.make_layout(8, config_lib.Loss(), 1)
    for platform, expected in (("cpu", "HIGHEST"), ("gpu", "HIGHEST"), ("tpu", "HIGH")):
        devices = np.array([types.SimpleNamespace(platform=platform)], object)
        placed = unplaced.on(devices.reshape(1, 1, 1, 1), "high")
        assert placed.in_group.precision == jax.lax.Precision[expected]
