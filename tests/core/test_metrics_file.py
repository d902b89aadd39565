"""Lines of metrics.jsonl that nobody wrote: counted, named, left out; by all who read them."""

import json

import pytest

from grain_jax.core import metrics_file
from grain_jax.train import metrics_writer

pytestmark = pytest.mark.quick

HOSTILE = [  # each ended the trainer, the report or the table in a traceback
    b'{"step": "x"}',
    b'{"step": 1e400, "loss": 1.0}',
    b"\xff\xfe\x00\x80",
    b'{"step": -1}',
    b"7",
    b'{"step": true}',
]


def _line(step, **values):
    return json.dumps({"step": step, **values}).encode()


def test_hostile_lines_are_counted_and_left_out_by_all_who_read_them(tmp_path, capsys):
    workdir = tmp_path
    lines = [_line(1, loss=2.0), *HOSTILE, _line(2, loss=1.0)]
    (workdir / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 3, "lo')
    lines = metrics_file.read(workdir)
    assert [(line.step, line.values["loss"]) for line in lines] == [(1, 2.0), (2, 1.0)]
    # The line that a kill cut off is no fault.
    assert f"{workdir}/metrics.jsonl: 6 of 8 lines left out" in capsys.readouterr().err
    metrics_writer.MetricsWriter(workdir, 1).close()  # rewrites the file
    assert (workdir / "metrics.jsonl").read_bytes() == _line(1, loss=2.0) + b"\n"


def test_numbers_that_are_not_finite_are_in_no_series(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1e400, "eval/a/top1": NaN, "x": 1}\n{"step": 2, "loss": 0.5}\n'
    )
    lines = metrics_file.read(tmp_path)
    assert len(lines) == 2
    assert metrics_file.series(lines) == {"x": ([1], [1.0]), "loss": ([2], [0.5])}
