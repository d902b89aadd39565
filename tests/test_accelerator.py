"""`benchmarks.accelerator` without an accelerator: order and budget of its parts, parity of the kernel."""

import pytest

from benchmarks import accelerator, attention


def test_the_parts_that_are_worth_most_come_first(tmp_path):
    parts = accelerator.parts("gpu", "NVIDIA H100 80GB HBM3", ["B/16", "S/16"], 256, tmp_path)
    first = ["parity", "step of B/16", "plan of B/16", "step of S/16"]
    assert [part.what for part in parts] == [*first, "plan of S/16"]
    assert parts[1].command[-3:] == ["--attention", "cudnn", "xla"]
    assert parts[2].command[-1] == "--topology=h100:1"
    on_cpu = accelerator.parts("cpu", "cpu", ["tiny"], 16, tmp_path)
    assert [part.what for part in on_cpu if "plan" in part.what] == []


SCRIPT = """
import sys
batch = int(sys.argv[sys.argv.index("--batch") + 1])
if sys.argv[1] == "slow":
    import time
    time.sleep(60)
if batch > 8:
    sys.exit("RESOURCE_EXHAUSTED: Out of memory")
if sys.argv[1] == "fails":
    sys.exit("a reason")
print("rows")
open(sys.argv[sys.argv.index("--json") + 1], "w").write("[1]")
"""


def test_a_part_takes_half_the_batch_where_memory_runs_out_and_no_more_than_its_time(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "part.py").write_text(SCRIPT)
    monkeypatch.setattr(accelerator, "ROOT", tmp_path)

    def run(how, left=20.0, seconds=1.0):
        part = accelerator.Part("part", ["part", how, "--batch", "32"], seconds)
        return accelerator.run(part, lambda: left, tmp_path / f"{how}.json")

    assert run("works") == dict(output="rows\n", figures=[1])
    said = [f"part: out of memory at batch {batch}" for batch in (32, 16)]
    assert capsys.readouterr().out.splitlines() == said
    assert run("fails") == dict(left_out="ended with 1: a reason")
    assert run("late", 0.5) == dict(left_out="needs 1 s of 0 left")
    assert "took more than" in run("slow", 2.0)["left_out"]


@pytest.mark.parametrize("normed", [True, False])
def test_parity_of_the_kernel(normed):
    arrays, ids, weight = attention.inputs(2, 9, 2, 16, normed)
    expected, got = (
        attention.with_gradients(attention.program_of(program, 2, ids), arrays, weight)
        for program in ("xla", "pallas")
    )
    assert [len(x[1]) for x in (expected, got)] == [6 if normed else 3] * 2
    errors = [attention.worst(g, e) for g, e in zip(got, expected)]
    assert max(errors) < 2e-5
    assert attention.worst(2 * expected[0], expected[0]) == pytest.approx(1)
