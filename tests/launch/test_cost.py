"""The roofline against sums done by hand, and the names of topologies."""

import pytest

from grain_jax.core import errors
from grain_jax.launch import chips, cost, hlo_work
from grain_jax.launch.hlo_collectives import Collective

pytestmark = pytest.mark.quick

V5E = chips.CHIPS["v5e"]


def collective(kind, *, size, payload, slices=1, overlapped=False, count=1):
    return Collective(kind, overlapped, False, size, slices, (), count, payload)


# v5e: 197 TFLOP/s, 819 GB/s, a ring sends 100 GB/s, one link 50 GB/s, 3.125 GB/s between slices.
@pytest.mark.parametrize(
    ("kind", "size", "slices", "payload", "within", "across"),
    [
        ("all-gather", 4, 1, 1e9, 0.75 * 1e9 / 100e9, 0),
        ("reduce-scatter", 4, 1, 1e9, 0.75 * 1e9 / 100e9, 0),
        ("all-reduce", 4, 1, 1e9, 1.5 * 1e9 / 100e9, 0),
        ("collective-permute", 16, 1, 1e9, 1e9 / 50e9, 0),
        ("collective-permute", 16, 2, 1e9, 0, 1e9 / 3.125e9),
        # 2 slices of 8: reduced over 8 inside, an eighth is exchanged with the other slice.
        ("all-reduce", 16, 2, 1e9, 1.75 * 1e9 / 100e9, 1e9 / 8 / 3.125e9),
        # what the TPU compiler sends through the host: groups of one chip a slice
        ("all-reduce", 2, 2, 1e9, 0, 1e9 / 3.125e9),
    ],
)
def test_time_of_a_collective(kind, size, slices, payload, within, across):
    got = cost.seconds(collective(kind, size=size, slices=slices, payload=payload), V5E)
    assert got == pytest.approx((within, across))


def test_a_transfer_hides_behind_what_runs_beside_it():
    hops = collective("collective-permute", size=16, payload=100e6, overlapped=True)  # 2 ms
    half = hops._replace(work=hlo_work.Work(197e9, 1.0))  # 1 ms
    line = cost.roofline(1.97e12, 0.0, [half], V5E)
    assert line.exposed_s == pytest.approx(1e-3) and line.step_s == pytest.approx(11e-3)
    both_ways = half._replace(ways=2)
    assert cost.roofline(1.97e12, 0.0, [both_ways], V5E).exposed_s == pytest.approx(0, abs=1e-12)
    unknown = hops._replace(work=None)
    assert cost.roofline(1.97e12, 0.0, [unknown], V5E).exposed_s == 0


def test_step_is_never_shorter_than_its_slowest_link():
    gathers = collective("all-gather", size=2, payload=200e6, overlapped=True)  # 1 ms
    line = cost.roofline(1.97e10, 0.0, [gathers], V5E)
    assert (line.step_s, line.bound) == (pytest.approx(1e-3), "interconnect")
    sends = collective("all-reduce", size=2, slices=2, payload=6.25e6, overlapped=True)  # 2 ms
    line = cost.roofline(1.97e10, 0.0, [gathers, sends], V5E)
    assert (line.step_s, line.bound) == (pytest.approx(2e-3), "network between slices")
    assert cost.roofline(0.0, 819e6, [], V5E).bound == "HBM"


@pytest.mark.parametrize(
    ("text", "name", "count", "shape", "slices", "hosts"),
    [
        ("v5e:16x16*2", "v5e", 512, (16, 16), 2, 128),
        ("h100:8x2", "h100", 16, (8,), 2, 2),
        ("v5e:1x1*4", "v5e", 4, (1, 1), 4, 4),
        ("tpu7x:4x4x4*2", "tpu7x", 256, (4, 4, 4), 2, 32),  # two devices a chip
        ("gb200:72x2", "gb200", 144, (72,), 2, 36),
    ],
)
def test_topology(text, name, count, shape, slices, hosts):
    got = chips.parse_topology(text)
    assert got == (chips.CHIPS[name], count, shape, slices)
    assert got.hosts == hosts


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("v7x:4x4", "one of v4, v5e, v5p, v6e, tpu7x, a100-40, a100-80, h100, h200"),
        ("v5e:256", "2 numbers, such as v5e:4x4"),
        ("gb200:80", "at most 72 GPUs per node x nodes, such as gb200:72x2"),
    ],
)
def test_an_unknown_topology_is_one_line(text, advice):
    with pytest.raises(errors.UserError) as error:
        chips.parse_topology(text)
    assert repr(text) in str(error.value) and advice in str(error.value)
    assert "\n" not in str(error.value)
