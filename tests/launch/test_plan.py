"""launch.plan: one real compile for TPUs, and what the user is told."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from grain_jax.core import errors
from grain_jax.launch import chips, compiler, plan, plan_text
from grain_jax.train import flops, forward, run, sharding, train_step
from tests import tiny
from tests.paths import ROOT

pytestmark = pytest.mark.long

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler for this platform"
)
# What TPUs alone do otherwise: their attention, and the passes of their products.
AS_ON_CPUS = {"model__attention": "xla", "loss__precision": "highest"}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan by libtpu: (what the command printed, the JSON). libtpu keeps 0.7 GB of its process."""
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    arguments = ["--config=tests/run_config.py", "--topology=v5e:2x4", f"--output={out}"]
    arguments += [f"--config.{key.replace('__', '.')}={value}" for key, value in AS_ON_CPUS.items()]
    command = [sys.executable, "-m", "grain_jax", "plan", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


class _Built(Exception):
    """Ends a training run once its program is built."""


@needs_libtpu
def test_plan_and_train_lower_the_same_program(planned, monkeypatch, tmp_path):
    """With the attention of every platform."""
    real = train_step.build

    def build(*args, **kwargs):
        raise _Built(real(*args, **kwargs))

    monkeypatch.setattr(train_step, "build", build)
    with pytest.raises(_Built) as caught:
        run.train(tiny.config(**AS_ON_CPUS), tmp_path)
    program = caught.value.args[0]
    traced = program.step.trace(program.state, program.batch)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert planned[1]["program"] == hashlib.sha256(text.encode()).hexdigest()


@needs_libtpu
def test_plan_of_a_compiled_step(planned):
    printed, stored = planned
    config = tiny.config()
    memory = stored["memory"]
    assert stored["fits"] and "FITS" in printed

    # By hand: the parameters are replicated, the batch is cut in 8, Adam has two moments and a count.
    params = sharding.unbox(jax.eval_shape(forward.Forward(config).init))
    size = sum(x.size * 4 for x in jax.tree.leaves(params))
    kinds = memory["arguments"]
    assert kinds["parameters"] == size
    assert kinds["moments"] == 2 * size + 2 * 4  # Adam's count and the schedule's
    batch = forward.abstract_batch(config)
    assert kinds["batch"] == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) // 8
    assert memory["limit_bytes"] == 15.75 * 2**30
    parts = ("arguments", "output", "temporaries", "code")
    written = sum(memory[f"{part}_bytes"] for part in parts)
    assert memory["total_bytes"] == written - memory["aliased_bytes"]
    assert memory["aliased_bytes"] >= 3 * size  # the state is given up

    assert stored["model_flops"] == round(flops.per_image(config).train * 16)
    assert stored["flops"] == pytest.approx(stored["model_flops"], rel=0.05)
    sums = stored["collectives"]["all-reduce"]
    assert sums["bytes"] >= size  # the gradients, at least
    assert sums["count"] == sums["sync"]["count"] + sums["overlapped"]["count"]
    assert stored["images_per_second_at_most"] == 16 / stored["roofline"]["step_s"]
    assert 0 < stored["mfu_at_most"] < 1 and stored["hbm_bytes"] > size
    assert stored["unknown_loops"] == 0 and len(stored["largest"]) == plan.LARGEST
    sizes = [entry["bytes"] for entry in stored["largest"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= memory["total_bytes"]
    assert f"{sizes[0] / 1e9:.2f} GB each" in printed


@pytest.mark.parametrize("topology, extra", [("v5e:2x4", "tpu"), ("b200:8", "cuda12")])
def test_a_missing_compiler_is_named(monkeypatch, topology, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UserError, match=rf'pip install "grain_jax\[{extra}\]"'):
        plan.make(tiny.config(), chips.parse_topology(topology))


def test_meshes_that_cross_nodes_are_refused():
    for mesh in (dict(mesh__fsdp=16), dict(mesh__dcn_data=7)):
        with pytest.raises(errors.UserError, match="nothing but data is cut over the network"):
            plan.make(tiny.config(batch_size=32, **mesh), chips.parse_topology("h100:8x2"))


def test_the_compiler_is_asked_for_gpus(monkeypatch):
    asked = {}

    def describe(**options):
        asked.update(options, flags=os.environ["XLA_FLAGS"])
        raise jax.errors.JaxRuntimeError("INVALID: no such GPU\nmore")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(compiler.topologies, "get_topology_desc", describe)
    before = os.environ.get("XLA_FLAGS")
    with pytest.raises(errors.UserError, match="--topology: .*: INVALID: no such GPU$"):
        plan.make(tiny.config(), chips.parse_topology("h100:4x2"))
    assert (asked["platform"], asked["topology"]) == ("cuda", "1x2x4")
    assert "NVIDIA H100 80GB HBM3" in asked["target_config"]
    assert "--xla_gpu_enable_triton_gemm=false" in asked["flags"]
    assert os.environ.get("XLA_FLAGS") == before


# Recorded: B/16 with 64 images per chip on v5e:2x2, remat=none, libtpu 0.0.42.1.
EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries"
    " (18.29G) exceeds available HBM (15.75G)."
)

LATE = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.29G of 15.75G hbm.
  1. Size: 512.00M
     Operator: op_name="jit(step)/a"
     Shape: f32[128]{0}
  2. Size: 3.00G
     Shape: bf16[8,4]{1,0}
"""


def test_out_of_memory_names_the_arrays_and_what_to_change(monkeypatch):
    compiled = compiler.Compiled(
        state_bytes={"parameters": 10**9, "moments": 2 * 10**9, "ema": 0, "batch": 10**6},
        memory={},
        out_of_memory=EARLY,
        program="",
        hlo="",
        mesh={"data": 8, "fsdp": 1, "tensor": 1},
        versions={"jax": "0"},
    )
    monkeypatch.setattr(compiler, "compile_step", lambda *a, **k: compiled)
    made = plan.make(tiny.config(), chips.parse_topology("v5e:2x4"))
    text = plan_text.page({"topology": "v5e:2x4", "overrides": [], **made})
    assert not made["fits"] and made["flops"] is None
    assert "DOES NOT FIT: 19.64 GB a chip, 2.73 GB more than the 16.91 GB" in text
    assert "--config.remat" in text and "Time of a step" not in text
    total, limit, named = compiler.parse_out_of_memory(LATE)
    assert (total, limit) == (round(18.29 * 2**30), round(15.75 * 2**30))
    assert named == [(2**29, "f32[128]", "jit(step)/a"), (3 * 2**30, "bf16[8,4]", "?")]
