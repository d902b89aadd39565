"""What the compiled step costs: FLOPs, bytes, temporaries and collectives must not grow unnoticed.

Counts of the compiler's output, no seconds, so they are the same on every machine. goldens/step_cost.json records them for
one version of JAX and the flags of `tests.compiling`. After a change that is meant to cost, UPDATE_GOLDENS=1 rewrites
them, and the commit says why.
"""

import json
import os
from importlib import metadata

import jax
import pytest
from etils import epath

from grain_jax.launch import hlo, hlo_collectives, hlo_work
from grain_jax.train import flops, sharding, train_step
from tests import paths, tiny

pytestmark = pytest.mark.long

GOLDEN = epath.Path(paths.GOLDENS) / "step_cost.json"
MESHES = {
    "data": dict(mesh__data=8),
    "all_axes": dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, microbatches=2),
}
# A little more than what rounding to tiles and choices of fusions change.
SLACK = {"flops": 1.001, "bytes_accessed": 1.05, "temporary_bytes": 1.05, "collective_bytes": 1.01}


def _costs(name):
    c = tiny.config(batch_size=32, text__pack_group=4, text__pack_rows=8, **MESHES[name])
    mesh = sharding.make_mesh(c.mesh, jax.devices())
    program = train_step.build(c, mesh, total_steps=10, steps_per_epoch=5.0)
    compiled = program.step.lower(program.state, program.batch).compile()
    module = hlo.parse(compiled.as_text())
    kinds: dict[str, list[int]] = {}
    for collective in hlo_collectives.collectives(module):
        kinds.setdefault(collective.kind, []).append((collective.count, collective.bytes))
    return {
        "flops": hlo_work.dot_flops(module),
        "bytes_accessed": hlo_work.bytes_accessed(module),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": {
            kind: {"count": sum(n for n, _ in counts), "bytes": sum(b for _, b in counts)}
            for kind, counts in sorted(kinds.items())
        },
    }


@pytest.mark.parametrize("name", [pytest.param("data", marks=pytest.mark.slow), "all_axes"])
def test_the_step_costs_no_more_than_recorded(name):
    costs, version = _costs(name), metadata.version("jaxlib")
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDENS"):
        golden |= {name: costs, "jaxlib": version}
        GOLDEN.write_text(json.dumps(golden, indent=2, sort_keys=True) + "\n")
    recorded = golden[name]
    assert set(costs["collectives"]) <= set(recorded["collectives"])
    if golden["jaxlib"] != version:  # another compiler fuses otherwise
        assert costs["flops"] <= 1.05 * recorded["flops"]
        return
    for name_of_cost in ("flops", "bytes_accessed", "temporary_bytes"):
        assert costs[name_of_cost] <= SLACK[name_of_cost] * recorded[name_of_cost], name_of_cost
    for kind, collective in costs["collectives"].items():
        assert collective["count"] <= recorded["collectives"][kind]["count"], kind
        most = SLACK["collective_bytes"] * recorded["collectives"][kind]["bytes"]
        assert collective["bytes"] <= most, kind


def test_eight_devices_share_the_work_and_repeat_none():
    """The recorded FLOPs of a device, times 8, are the model's own count for the batch (`flops.py`)."""
    recorded = json.loads(GOLDEN.read_text())
    c = tiny.config(batch_size=32, text__pack_group=4, text__pack_rows=8, **MESHES["data"])
    per_batch = flops.per_image(c).train * c.batch_size
    assert 8 * recorded["data"]["flops"] / per_batch == pytest.approx(1, abs=0.01)
