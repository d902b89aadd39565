"""The time of Pallas kernels: a recorded schedule, products by hand, and the line of the plan."""

import dataclasses
import pathlib

import pytest

from grain_jax.launch import chips, cost, hlo, hlo_work, plan_text, schedule

pytestmark = pytest.mark.quick

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
V5E = chips.CHIPS["v5e"]
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
