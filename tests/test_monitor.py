import json
import math
import os

import pytest

from grain_jax import monitor

METRICS = {term: 1.0 for term in monitor.CHECKED} | {"matched_iou": 0.5}


def test_lines_beyond_the_restored_step_are_removed(tmp_path):
    first = monitor.Monitor(tmp_path, 0, 10, 4)
    for step in range(1, 6):
        first.write(step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    second = monitor.Monitor(tmp_path, 3, 10, 4)
    second.write(4, {"loss": 40.0})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 40)]


@pytest.mark.parametrize("term", monitor.CHECKED)
def test_the_first_bad_term_is_named(term):
    with pytest.raises(
        monitor.NotFinite, match=f"^{term} is nan at step 9; it was finite at step 5"
    ):
        monitor.check_finite({**METRICS, term: math.nan}, 5, 9)
    monitor.check_finite(METRICS, 5, 9)


def test_durations():
    assert [monitor.duration(s) for s in (4.4, 65, 7800)] == ["4s", "1m05s", "2h10m"]


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    log = monitor.Monitor(tmp_path, 0, 100, 4)
    rates = log.rates(10, 0.0)
    log.progress(10, METRICS | rates)
    log.progress(11, METRICS | rates)  # too soon after the last
    log.progress(100, METRICS | rates)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 10/100 (10%)  ETA ") and "loss 1.000" in lines[0]
    assert "ETA 0s" in lines[1]


def test_pauses_are_left_out_of_the_rates(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    log = monitor.Monitor(tmp_path, 0, 100, 10)
    now[0] = 1.0
    with log.pause():
        now[0] = 50.0
    now[0] = 51.0
    rates = log.rates(4, wait_seconds=0.5)
    assert rates == {
        "images_per_second": 20.0,
        "model_flops_per_second": 0.0,
        "input_wait_fraction": 0.25,
    }


def test_mfu_is_told_where_the_peak_is_known(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    known = monitor.Monitor(tmp_path, 0, 100, 10, flops_per_image=3e9, peak_flops=4e11)
    unknown = monitor.Monitor(tmp_path, 0, 100, 10, flops_per_image=3e9)
    now[0] = 2.0
    rates = known.rates(10, 0.0)  # 50 images/s
    assert rates["model_flops_per_second"] == 150e9 and rates["mfu"] == 0.375
    known.progress(10, METRICS | rates)
    assert "  50 images/s  MFU 37.5%  input wait" in capsys.readouterr().err
    rates = unknown.rates(10, 0.0)
    assert rates["model_flops_per_second"] == 150e9 and "mfu" not in rates
    unknown.progress(10, METRICS | rates)
    assert "  50 images/s  input wait" in capsys.readouterr().err


def test_a_terminal_line_is_rewritten_and_never_wraps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(monitor.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(monitor, "get_terminal_size", lambda: os.terminal_size((60, 24)))
    log = monitor.Monitor(tmp_path, 0, 100, 4)
    log.progress(10, METRICS | log.rates(10, 0.0))
    written = capsys.readouterr().err
    assert written.startswith("\r\x1b[2Kstep 10/100") and not written.endswith("\n")
    assert len(written.removeprefix("\r\x1b[2K")) == 59
