"""benchmarks.accelerator in its small setting: errors are below their bounds, and show what is wrong."""

import json
import subprocess
import sys

import pytest

from benchmarks import accelerator, harness, replicas
from tests import runs
from tests.paths import ROOT

NAMES = ("image_caption", "image_description", "box", "region_description", "box_description")


def errors_of(rows):
    return {row.check: float(row.measured.split()[-1]) for row in rows}


def test_attention_is_as_near_to_float64_as_its_type_allows():
    rows = list(accelerator.attentions(small=True))
    errors = errors_of(rows)
    assert all(row.ok for row in rows)
    for tower in ("image", "text"):
        exact, *rounded = (
            errors[f"attention, {tower}: {program}"]
            for program in ("xla, float32", "xla, bfloat16", "pallas, bfloat16")
        )
        assert exact < 5e-6 and all(1e-3 < error < 2e-2 for error in rounded)


def test_losses_are_those_of_float64():
    rows = list(accelerator.loss_terms(small=True))
    assert {row.check for row in rows} == {f"loss: {x}" for x in (*NAMES, "gradients of all")}
    assert all(row.ok for row in rows) and max(errors_of(rows).values()) < 1e-5


def test_wrong_attention_and_a_wrong_loss_differ(monkeypatch):
    real = replicas.attention, replicas.image_text
    monkeypatch.setattr(
        replicas, "attention", lambda q, k, v, *more, **named: real[0](q, k, 1.1 * v, *more, **named)
    )
    monkeypatch.setattr(replicas, "image_text", lambda *given: real[1](*given) * 1.001)
    assert not any(row.ok for row in accelerator.attentions(small=True))
    wrong = {row.check for row in accelerator.loss_terms(small=True) if not row.ok}
    assert wrong == {"loss: image_caption", "loss: image_description", "loss: gradients of all"}
    assert not accelerator._error("", float("nan"), 1.0).ok


@pytest.mark.slow
def test_the_command_writes_its_table_and_a_killed_run_resumes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.accelerator", "--small", f"--output={tmp_path / 'X.md'}"]
    environment = runs.on_one_device(tmp_path / "compiled")
    done = subprocess.run(
        [*command, f"--json={tmp_path / 'X.json'}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    about, _, *table = (tmp_path / "X.md").read_text().splitlines()
    assert about.startswith("cpu, ") and "\n".join(table) in done.stdout.replace("\n\n", "\n")
    rows = [accelerator.Row(*row.values()) for row in json.loads((tmp_path / "X.json").read_text())["rows"]]
    assert [str(row) for row in rows] == table[2:] and all(line.endswith("| ok |") for line in table[2:])
    resumed, image, *_, step, mfu, memory = rows
    assert resumed.measured.startswith("12 of 12 steps equal to the bit, 3")
    assert image.check == "attention, image: xla, float32" and len(rows) == 1 + 6 + 6 + 3
    assert float(step.measured.split()[0]) > 0 and step.expected == "- (plan does not know cpu)"
    assert "peak of cpu unknown" in mfu.measured and memory.measured == "- (cpu does not say)"


def test_lines_of_a_run_leave_out_what_no_two_runs_share(tmp_path):
    same = {"step": 1, "loss": 2.5}
    differs = {"mfu": 0.5, "time/save": 1.0, "process/slowest": 1, "memory_peak_bytes": 7.0}
    assert harness.lines(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(json.dumps(same | differs) + '\n{"step": 2, "lo')
    assert harness.lines(tmp_path) == [same]
