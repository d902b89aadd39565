"""Lines of metrics.jsonl that nobody wrote: counted, named, left out; by all who read them."""

import json

import pytest
from grain_jax.launch import sweep_runs

from grain_jax import verify
from grain_jax.report import pictures, run_files
from grain_jax.runtime import metrics_file, metrics_writer
from grain_jax.verify import workdir as workdir_files

HOSTILE = [  # each ended the trainer, the report or the table in a traceback
    b'{"step": "x"}',
    b'{"step": 1e400, "loss": 1.0}',
    b"\xff\xfe\x00\x80",
    b'{"step": null}',
    b'{"step": -1}',
    b"7",
    b'["step"]',
    b'"step"',
    b"[" * 100_000,
    b'{"step": true}',
]


def _line(step, **values):
    return json.dumps({"step": step, **values}).encode()


@pytest.fixture(params=HOSTILE, ids=lambda bad: repr(bad[:16]))
def workdir(request, tmp_path):
    lines = [_line(1, loss=2.0), request.param, _line(2, loss=1.0)]
    content = b"\n".join(lines) + b'\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    return tmp_path


def _said(workdir):
    return f"{workdir}/metrics.jsonl, line 2: got "


def test_a_hostile_line_is_named_and_left_out(workdir):
    lines, faults = metrics_file.read(metrics_file.files(workdir))
    assert [(line.step, line.values["loss"]) for line in lines] == [(1, 2.0), (2, 1.0)]
    (fault,) = faults  # the line that a kill cut off is none
    assert fault.startswith(_said(workdir))
    assert fault.endswith(
        "expected a JSON object with a whole number step; 1 of 3 lines do not count"
    )


def test_the_trainer_says_so_and_rewrites_the_file(workdir, capsys):
    log = metrics_writer.MetricsWriter(workdir, 1, 10, 16)
    assert _said(workdir) in capsys.readouterr().err
    assert (workdir / "metrics.jsonl").read_bytes() == _line(1, loss=2.0) + b"\n"
    log.close()


def test_the_report_says_so_and_draws_the_rest(workdir):
    run = run_files.read(workdir)
    assert run.series == {"loss": ([1, 2], [2.0, 1.0])} and run.step == 2
    assert run.unmeasured[0].startswith(_said(workdir))
    pictures.curves(workdir / "metrics.jsonl", workdir / "curves.png")


def test_the_table_of_a_sweep_leaves_it_out(workdir):
    assert sweep_runs.last_step(workdir) == 2


def test_verify_refuses_it(workdir):
    with pytest.raises(verify.Mismatch, match="line 2: got .* expected a JSON object"):
        workdir_files._metrics(workdir)


def test_numbers_that_are_not_finite_are_in_no_series(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1e400, "eval/a/top1": NaN, "x": 1}\n{"step": 2, "loss": 0.5}\n'
    )
    lines, faults = metrics_file.read(metrics_file.files(tmp_path))
    assert not faults and len(lines) == 2
    assert metrics_file.series(lines) == {"x": ([1], [1.0]), "loss": ([2], [0.5])}
