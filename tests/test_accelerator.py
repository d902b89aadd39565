"""`benchmarks.accelerator` without an accelerator: order and budget of the parts, their processes, tables, parity."""

import json
import os
import time

import pytest

from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import attention, parts, processes, profile
from benchmarks.accelerator.tables import tables

DEVICE = dict(platform="gpu", kind="NVIDIA H100 80GB HBM3")


def _step(size, side, rate, **values):
    row = dict(size=size, side=side, batch=256, seconds=[256 / rate] * 3, images_per_second=rate)
    return row | dict(mfu=None, peak_bytes=None, loss=1.0) | values


def test_the_parts_that_are_worth_most_come_first():
    todo = accelerator.plan_of_parts(DEVICE, {"B/16": 256, "S/16": 256})
    assert [part.what for part in todo] == [
        "parity",
        "B/16, cudnn",
        "B/16, PyTorch",
        "B/16, xla",
        "plan of B/16",
        "S/16, cudnn",
        "S/16, PyTorch",
        "input wait",
        "S/16, xla",
        "plan of S/16",
    ]
    on_cpu = accelerator.plan_of_parts(dict(platform="cpu", kind="cpu"), {"tiny": 16})
    assert [part.what for part in on_cpu if part.table == "step"] == ["tiny, xla", "tiny, PyTorch"]
    assert on_cpu[0].arguments == dict(programs=["xla", "pallas"], small=True)


def _rows(fail=None, sleep=0.0):
    yield dict(process=os.getpid(), flags=os.environ.get("SIDE"))
    time.sleep(sleep)
    if fail == "end":
        os._exit(7)
    if fail:
        raise ValueError(fail)
    yield dict(operations=[])


def test_rows_come_as_they_are_made_and_the_budget_is_kept(capsys):
    of = lambda what, **arguments: processes.Part(
        "rows", what, _rows, arguments, 10.0, {"SIDE": what}
    )
    fails = of("fails", fail="a reason\nand more")
    todo = [of("whole"), fails, of("ends", fail="end"), of("late")]
    written, results = [], {}
    clock = iter([0.0, 0.0, 0.0, 0.0, 45.0])
    budget = processes.Budget(1.0, lambda: next(clock))
    accelerator.measure(todo, budget, results, lambda: written.append(json.dumps(results)))
    rows = results["rows"]
    assert [row["flags"] for row in rows] == ["whole", "fails", "ends"]
    assert os.getpid() not in {row["process"] for row in rows}
    assert results["operations"] == dict(of="whole", rows=[])
    assert results["left_out"] == [
        "fails: ValueError: a reason",
        "ends: its process ended with status 7",
        "late: left out, needs 10 s of 5 left",
    ]
    assert len(written) == 7  # two rows, a row and its fault twice, the part that is left out
    assert capsys.readouterr().out.splitlines() == results["left_out"]


def test_a_part_that_takes_too_long_is_stopped():
    part = processes.Part("rows", "slow", _rows, dict(sleep=60.0), 0.0)
    began = time.monotonic()
    rows = list(processes.rows(part, limit=2.0))
    assert time.monotonic() - began < 30
    assert rows[-1] == dict(left_out="stopped, took more than the 2 s that were left")


def test_tables():
    results = dict(
        step=[
            _step("B/16", "ours, cudnn", 2560.0, mfu=0.4567, peak_bytes=20e9, compiled_bytes=21e9),
            _step("B/16", "PyTorch packed", 1280.0),
            _step("B/16", "PyTorch padded", 640.0),
            _step("S/16", "ours, cudnn", 6000.0),
        ],
        parity=[dict(shape="text", program="cudnn", dtype="bfloat16", value=3e-3, gradient=4e-3)],
        operations=dict(
            of="B/16, cudnn", rows=[dict(name="fusion.1", ms=1.5, share=0.25, where="mlp")]
        ),
        plan=[
            dict(size="B/16", batch=256, attention="cudnn", topology="h100:1", estimate=True)
            | dict(bytes=22e9, seconds=0.05)
        ],
        input=[
            dict(what="B/16, batch 256", steps_a_line=10, images_per_second=2500.0)
            | dict(wait_fractions=[0.0, 0.02])
        ],
    )
    lines = tables(results).splitlines()
    assert (
        lines[2].split()
        == "B/16 ours, cudnn 256 2,560.0 100.0 (100.0 - 100.0) 45.7% 20.00 21.00".split()
    )
    assert (
        "B/16: our fastest step does 2.00 times those of PyTorch packed, 4.00 times those of PyTorch padded"
        in lines
    )
    assert any(line.split()[-2:] == ["3.0e-03", "4.0e-03"] for line in lines)
    assert any(line.split() == ["fusion.1", "1.500", "25.0%", "mlp"] for line in lines)
    assert (
        "plan of B/16, 256 images on h100:1 (an estimate): 22.00 GB, at best 50.0 ms; measured 100.0 ms,"
        " at most 20.00 GB" in lines
    )
    assert lines[-1] == (
        "waiting for input: 1.0% of the time, at most 2.0% in 10 steps; B/16, batch 256, 2,500 images/s"
    )


def test_time_inside_another_operation_counts_once():
    loop = [(0.0, 100.0, "while"), (10.0, 30.0, "dot"), (50.0, 40.0, "dot"), (55.0, 5.0, "copy")]
    own = profile.own_times([*loop, (100.0, 7.0, "add")])
    assert own == {"while": 30.0, "dot": 65.0, "copy": 5.0, "add": 7.0}


def test_the_profile_names_operations_of_the_program(tmp_path):
    import jax
    import jax.numpy as jnp

    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda x: jnp.tanh(x @ x)).lower(x).compile()
    file = profile.trace(lambda: compiled(x), str(tmp_path))
    found = profile.operations(file, compiled.as_text())
    assert found and sum(row["share"] for row in found) == pytest.approx(1)
    assert any("tanh" in row["where"] or "dot_general" in row["where"] for row in found)


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


def test_batches_fit_and_a_plan_stands_beside_them():
    assert parts.largest_batch("tiny", 80e9) == 256
    (known,) = parts.plan("NVIDIA H100 80GB HBM3", "tiny", 16, "cudnn")
    assert (known["topology"], known["attention"]) == ("h100:1", "cudnn")
    assert 10e6 < known["bytes"] < 1e9 and 0 < known["seconds"] < 1e-2
    (unknown,) = parts.plan("a card", "tiny", 16, "xla")
    assert unknown == dict(left_out="no chip of grain_jax.launch.chips is called 'a card'")
