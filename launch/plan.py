"""Plans a run for chips that this machine does not have: grain-jax plan --config X --topology v5e:16x16"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from grain_jax import config as config_lib
from grain_jax.cli import process
from grain_jax.config import loading
from grain_jax.core import atomic
from grain_jax.input_pipeline import derived
from grain_jax.launch import chips, compiler, cost, hlo, hlo_collectives, hlo_work, plan_text, schedule
from grain_jax.launch.arguments import Plan
from grain_jax.train import flops, sharding

# Steps: nobody says here how many examples there are, and the learning rate's schedule alone depends on it.
EPOCH = 10_000
LARGEST = 6  # arrays that are named


def make(config: config_lib.Config, topology: chips.Topology) -> dict[str, Any]:
    """The plan of a run on that topology, as the dictionary that `--output` writes.

    Raises:
      UserError: config and topology do not fit each other, or the compiler is missing.
      CompilerFailed: the compiler refuses the program.
    """
    mesh = mesh_sizes(config.mesh, topology)
    # As the trainer derives them: each host's images are whole lanes.
    lanes = topology.hosts if config.batch_size % topology.hosts == 0 else 1
    limits = derived.Limits(mesh["data"] * mesh["fsdp"], lanes)
    config, derived_from = derived.planned(config.with_dtype(topology.chip.name), limits)
    steps = config.total_steps or max(round(config.total_epochs * EPOCH), 1)
    epoch = float(config.total_steps or EPOCH)
    compiled = compiler.compile_step(config, topology, total_steps=steps, steps_per_epoch=epoch)
    return {
        "chips": topology.chips,
        "devices": topology.count,
        "hosts": topology.hosts,
        "slices": topology.slices,
        "chip": topology.chip.name,
        "mesh": compiled.mesh,
        "batch_size": config.batch_size,
        "derived": derived_from,
        "versions": compiled.versions,
        "program": compiled.program,
        "model_flops": round(flops.per_image(config).train * config.batch_size),
        **_of_program(compiled, topology, config),
    }


def mesh_sizes(mesh: config_lib.Mesh, topology: chips.Topology) -> dict[str, int]:
    """The sizes of the (data, fsdp, tensor) mesh over these chips. Raises ShardingError."""
    sizes = sharding.mesh_sizes(mesh, topology.count)
    if sizes["data"] % topology.slices or sizes["data"] % mesh.dcn_data:
        raise sharding.ShardingError(
            f"mesh: got data = {sizes['data']} (mesh.dcn_data={mesh.dcn_data}) on {topology.slices} slices or"
            " nodes, expected a multiple of both: nothing but data is cut over the network between them"
        )
    return sizes


def _of_program(
    compiled: compiler.Compiled, topology: chips.Topology, config: config_lib.Config
) -> dict[str, Any]:
    """Memory, FLOPs, collectives and times of a compiled step, or of one that ran out of memory."""
    limit, kinds = round(topology.chip.hbm_bytes), compiled.state_bytes
    if compiled.out_of_memory is not None:
        total, available, largest = compiler.parse_out_of_memory(compiled.out_of_memory)
        arguments = sum(kinds.values())
        memory = _memory(kinds, available or limit, arguments, total - arguments)
        unknown = ("flops", "hbm_bytes", "kernels", "roofline", "images_per_second_at_most", "mfu_at_most")
        out = {"memory": memory, "fits": False, "largest": _largest(largest), "collectives": {}}
        return out | dict.fromkeys(unknown)
    module = hlo.parse(compiled.hlo)
    memory = _memory(kinds, limit, **compiled.memory)
    return {
        "memory": memory,
        "fits": memory["total_bytes"] <= limit,
        "largest": _largest(hlo_work.arrays(module)),
        **work(module, topology, config, compiled.mesh, compiled.cycles),
    }


def work(
    module: hlo.Module,
    topology: chips.Topology,
    config: config_lib.Config,
    mesh: dict[str, int],
    cycles: dict[str, int],
) -> dict[str, Any]:
    """FLOPs, traffic, collectives and times of a compiled step; `mesh`, `cycles` as in compiler.Compiled."""
    kernels, counted = schedule.price(module, cycles, topology.chip)
    module = dataclasses.replace(module, kernels=kernels)
    sums = hlo_collectives.collectives(module, mesh=mesh, slices=topology.slices)
    traffic = hlo_work.bytes_accessed(module)
    roofline = cost.roofline(hlo_work.dot_flops(module, passes=True), traffic, sums, topology.chip)
    peak = topology.count * topology.chip.bf16_flops
    of_kernels = sum(n * kernels.get(i.name, 0.0) for _, i, n in module.running())
    return {
        "flops": round(hlo_work.dot_flops(module) * topology.count),
        "unknown_loops": list(module.trips.values()).count(None),
        "hbm_bytes": round(traffic),
        "kernels": {"runs": counted, "seconds": of_kernels / topology.chip.bf16_flops},
        "collectives": by_kind(sums),
        "roofline": roofline._asdict(),
        "images_per_second_at_most": config.batch_size / roofline.step_s,
        "mfu_at_most": flops.per_image(config).train * config.batch_size / (roofline.step_s * peak),
    }


def _memory(kinds, limit, arguments, temporaries, output=0, aliased=0, code=0, **peak):
    """The memory table. Donated arguments and outputs share their bytes (`aliased`)."""
    return {
        "arguments": dict(kinds, padding=arguments - sum(kinds.values())),
        "arguments_bytes": arguments,
        "temporaries_bytes": temporaries,
        "output_bytes": output,
        "aliased_bytes": aliased,
        "code_bytes": code,
        "total_bytes": arguments + output - aliased + temporaries + code,
        "limit_bytes": limit,
        **{f"{name}_bytes": size for name, size in peak.items()},
    }


def _largest(arrays: Iterable[tuple[int, str, str]]) -> list[dict[str, Any]]:
    """The largest arrays, from (bytes, shape, operation); equal ones are one entry with their number."""
    entries = [
        {"count": count, "shape": shape, "bytes": size, "where": where}
        for (size, shape, where), count in Counter(arrays).items()
    ]
    return sorted(entries, key=lambda entry: -entry["bytes"])[:LARGEST]


def by_kind(collectives: list[hlo_collectives.Collective]) -> dict[str, Any]:
    """kind -> count and bytes per chip and step: in all, by overlap with work, and by mesh axes."""
    out: dict[str, Any] = {}
    zero = {"count": 0, "bytes": 0}
    for c in collectives:
        parts = {"overlapped": {**zero}, "sync": {**zero}, "axes": []}
        entry = out.setdefault(c.kind, {**zero, **parts})
        for part in (entry, entry["overlapped" if c.overlapped else "sync"]):
            part["count"] += c.count
            part["bytes"] += round(c.bytes)
        axes = "x".join(c.axes) + (" between slices" if c.slices > 1 else "")
        if axes and axes not in entry["axes"]:
            entry["axes"].append(axes)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, plans, prints."""
    args = Plan.parse(arguments)
    # JAX would look for TPUs here, since libtpu is there.
    jax.config.update("jax_platforms", "cpu")
    # JAX reads no program back without its device.
    jax.config.update("jax_enable_compilation_cache", False)
    config = loading.load(args.config, args.overrides)
    plan = make(config, chips.parse_topology(args.topology))
    plan = {"topology": args.topology, "overrides": args.overrides, **plan}
    print(plan_text.page(plan))
    if args.output:
        atomic.write_text(args.output, json.dumps(plan, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    process.run(main)
