"""The roofline by hand, names of topologies, and the time of Pallas kernels by a recorded schedule."""

import dataclasses
import pathlib

import pytest

from grain_jax.core import errors
from grain_jax.launch import chips, cost, hlo, hlo_work, plan_text, schedule
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
        ("v5e-64", "v5e", 64, (8, 8), 1, 16),
        ("v6e-8*2", "v6e", 16, (2, 4), 2, 4),
        ("v5p-64", "v5p", 32, (2, 4, 4), 1, 8),  # TensorCores
        ("v4-8", "v4", 4, (2, 2, 1), 1, 1),
        ("tpu7x-128", "tpu7x", 128, (4, 4, 4), 1, 16),
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
        ("v5e:256", "2 numbers, such as v5e:4x4, or a size such as v5e-64"),
        ("v5e-48", "2 numbers, such as v5e:4x4, or a size such as v5e-64"),
        ("gb200:80", "at most 72 GPUs per node x nodes, such as gb200:72x2"),
    ],
)
def test_an_unknown_topology_is_one_line(text, advice):
    with pytest.raises(errors.UserError) as error:
        chips.parse_topology(text)
    assert repr(text) in str(error.value) and advice in str(error.value)
    assert "\n" not in str(error.value)


# Of a kernel for v5e by libtpu 0.0.42.1, with all but the control flow cut out: a grid of 5, a loop of 3
# products [12, 64] x [64, 12] and a `pl.when`.
RECORDED = pathlib.Path(__file__).with_name("bundles.txt").read_text()
BODY = pathlib.Path(__file__).with_name("kernel.b64").read_text().strip()
KERNEL = f"""
HloModule m, is_scheduled=true

ENTRY %main (a: bf16[15,12,64]) -> f32[15,12,12] {{
  %a = bf16[15,12,64]{{2,1,0}} parameter(0)
  %small.1 = f32[15,12,12]{{2,1,0}} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={{"body":"{BODY}","cost_estimate":{{"flops":"100"}}}}
  ROOT %small.2 = f32[15,12,12]{{2,1,0}} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={{"body":"{BODY}"}}
}}
"""
PADDED = 5 * 3 * 2 * 16 * 128 * 128  # rows fill 8 sublanes, depth and columns 128 lanes
BUNDLES = 7 + 5 * (17 + 3 * 15) + 6  # outside, each program, each product; behind `pl.when`


def test_bundles_count_as_often_as_their_loops_run():
    assert schedule.cycles(RECORDED) == BUNDLES
    unknown = RECORDED.replace("totalorder %s162_s20, 3", "totalorder %s162_s20, %s7_s3")
    assert schedule.cycles(unknown) == BUNDLES - 5 * 2 * 15


def test_schedules_are_read_by_the_name_of_the_kernel(tmp_path):
    for name in ("small.1", "fusion", "<late-finalization>"):
        (tmp_path / f"17961-{name}-02-final_bundles.txt").write_text(RECORDED)
    (tmp_path / "17961-small.1-01-schedule-analysis_final_bundles.txt").write_text("")
    assert schedule.read(tmp_path, KERNEL) == {"small.1": BUNDLES}


def test_a_kernel_takes_its_schedule_and_at_least_its_padded_products():
    """Equal kernels share a schedule; without one the padded products count."""
    assert schedule.padded_flops(BODY) == PADDED
    module = hlo.parse(KERNEL)
    priced, counts = schedule.price(module, {"small.1": BUNDLES}, V5E)
    by_schedule = BUNDLES / 1.5e9 * 197e12
    assert priced == pytest.approx({"small.1": by_schedule, "small.2": by_schedule})
    assert counts == {schedule.SCHEDULE: 2}
    assert schedule.price(module, {}, V5E) == (dict.fromkeys(priced, PADDED), {schedule.PADDED: 2})
    assert schedule.price(module, {"small.1": 1}, V5E)[1] == {schedule.PADDED: 2}

    module = dataclasses.replace(module, kernels=priced)
    assert hlo_work.dot_flops(module) == 100  # as the kernels say
    flops = hlo_work.dot_flops(module, passes=True)
    assert cost.roofline(flops, 0.0, [], V5E).compute_s == pytest.approx(2 * BUNDLES / 1.5e9)


def test_the_plan_says_how_kernels_were_counted():
    roofline = cost.roofline(1.97e12, 0.0, [], V5E)._asdict()
    kernels = {"seconds": 2e-3, "runs": {schedule.SCHEDULE: 48, schedule.PADDED: 2}}
    rest = dict(hbm_bytes=0, images_per_second_at_most=1.0, mfu_at_most=0.5)
    rows = plan_text._times({"roofline": roofline, "kernels": kernels, **rest})
    note = "of it: 48 by libtpu's schedule, 2 by their padded shapes"
    assert rows[:2] == [(*rows[0][:1], "10 ms", rows[0][2]), ("  kernels", "2 ms", note)]
    none = plan_text._times({"roofline": roofline, "kernels": {"seconds": 0.0, "runs": {}}, **rest})
    assert rows[0][2] == none[0][2] + ", and kernels"
    assert none[1:] == rows[2:]


def test_clocks_reach_the_printed_peaks():
    """Cores x MXUs x area x rows a cycle x 2 FLOPs x clock."""
    per_cycle = {
        "v4": 8 * 128**2,
        "v5e": 4 * 128**2,
        "v5p": 8 * 128**2,
        "v6e": 4 * 256**2,
        "tpu7x": 4 * 256**2,
    }
    for name, products in per_cycle.items():
        chip = chips.CHIPS[name]
        assert 2 * products * chip.clock_ghz * 1e9 == pytest.approx(chip.bf16_flops, rel=3e-3), name
