"""Plans a run for chips that this machine does not have: grain-jax plan --config X --topology v5e:16x16

The very step that `grain_jax.train` runs is compiled for them on this machine's CPU: by libtpu for TPUs, by the
CUDA plugin of JAX for GPUs (h100:8x2). Without that plugin a plan for GPUs is arithmetic, labelled ESTIMATE. Prints
whether it fits, what bounds its speed, what the input must deliver, and the bill.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from grain_jax.launch import (
    chips,
    compiler,
    cost,
    estimate,
    hlo,
    hlo_collectives,
    hlo_work,
    plan_text,
    search,
)
from grain_jax.launch.arguments import PlanOptions as Options
from grain_jax.launch.arguments import plan_parser

from grain_jax import config as config_lib
from grain_jax import errors, progress
from grain_jax.cli import config_file, process
from grain_jax.files import atomic
from grain_jax.input_pipeline import derived
from grain_jax.training import flops, memory_use

PER_MILLION = 1_000_000  # examples, where nobody said how many there are
LARGEST = 6  # buffers named when memory runs out
# Of a step that was compiled for GPUs without one.
NOT_KNOWN = (
    "which kernels are the fastest: autotuning needs a GPU and is off; cuBLAS makes all products",
    "the speed: times are bounds from the peak rates on NVIDIA's data sheets",
    "what CUDA, NCCL and cuBLAS take beside the program: keep a few GB free",
)


def length(config: config_lib.Config, examples: int | None) -> tuple[int, float, int, bool]:
    """(total steps, steps per epoch, examples of the data set, whether that number is assumed).

    Without `examples`, a run of `total_steps` is one epoch, and a run of `total_epochs` has a data set of a
    million: its days and money are then "per million examples".
    """
    if config.total_steps is not None:
        count = examples or config.total_steps * config.batch_size
        return config.total_steps, count / config.batch_size, count, False
    count = examples or PER_MILLION
    per_epoch = count / config.batch_size
    return max(round(config.total_epochs * per_epoch), 1), per_epoch, count, examples is None


def make(
    config: config_lib.Config,
    topology: chips.Topology,
    options: Options,
    line: progress.Line | None = None,
) -> dict[str, Any]:
    """The plan, as the dictionary that `--json` writes.

    Args:
      config: the run.
      topology: what it would run on.
      options: prices, rates and the size of the data set.
      line: shows the progress.

    Raises:
      UserError: config and topology do not fit each other, or libtpu is missing.
      CompilerFailed: the compiler crashed.
    """
    line = line or progress.Line(silent=True)
    mesh = estimate.mesh_sizes(config.mesh, topology.count, topology.slices)
    # As the trainer derives them: each host's images are whole lanes.
    lanes = topology.hosts if config.batch_size % topology.hosts == 0 else 1
    config, derived_from = derived.planned(
        config, derived.Place(mesh["data"] * mesh["fsdp"], lanes)
    )
    total_steps, per_epoch, examples, made_up = length(config, options.examples)
    per_image = flops.per_image(config)
    not_compiled = None if topology.chip.is_tpu else compiler.missing(topology.chip)
    plan: dict[str, Any] = {
        "chips": topology.count,
        "hosts": topology.hosts,
        "slices": topology.slices,
        "chip": topology.chip.name,
        "estimate": not_compiled is not None,
        "not_compiled": not_compiled,
        "not_known": [] if topology.chip.is_tpu else list(NOT_KNOWN),
        "batch_size": config.batch_size,
        "levers": levers(config),
        "derived": derived_from,
        "model_flops": round(per_image.train * config.batch_size),
    }
    if not_compiled is None:
        compiled = compiler.compile_step(
            config,
            topology,
            total_steps=total_steps,
            steps_per_epoch=per_epoch,
            timeout=options.timeout,
            line=line,
        )
        cached = ", from the cache" if compiled.cached else ""
        line.show(f"compiled in {compiled.seconds:.0f} s{cached}", now=True)
        plan |= _of_compiled(compiled, config, topology)
        plan["versions"] = compiled.versions
        checkpoint_bytes = compiled.checkpoint_bytes
    else:
        line.show(f"estimating: {not_compiled}", now=True)
        guess = estimate.of_gpus(config, topology)
        plan |= _of_estimate(guess, plan["model_flops"], config, topology)
        checkpoint_bytes = guess.checkpoint_bytes
    plan["checkpoint"] = {
        "bytes": checkpoint_bytes,
        # Every host writes its share.
        "seconds": checkpoint_bytes / (options.storage_rate * topology.hosts),
    }
    plan["run"] = {
        "total_steps": total_steps,
        "examples": examples,
        "per_million": made_up,
        "images": total_steps * config.batch_size,
    }
    _add_time(plan, config, topology, options)
    return plan


def levers(config: config_lib.Config) -> dict[str, Any]:
    """The keys that trade memory against time, with their values."""
    return {
        "model.attention": config.model.attention,
        "remat": config.remat,
        "microbatches": config.microbatches,
        "mesh.fsdp": config.mesh.fsdp,
        "mesh.tensor": config.mesh.tensor,
        "optim.moment_dtype": config.optim.moment_dtype,
        "loss.tile": config.loss.tile,
        "loss.gather": config.loss.gather,
    }


def _of_compiled(compiled: compiler.Compiled, config, topology) -> dict[str, Any]:
    """Memory, FLOPs, collectives and roofline of a compiled step, or of one that ran out of memory."""
    limit = round(topology.chip.hbm_bytes)
    out: dict[str, Any] = {"mesh": compiled.mesh, "traced_flops": compiled.traced_flops}
    kinds = compiled.state_bytes
    if compiled.out_of_memory is not None:
        total, there_is, largest = compiler.parse_out_of_memory(compiled.out_of_memory)
        arguments = sum(kinds.values())
        out["memory"] = _memory(kinds, arguments, total - arguments, 0, 0, 0, there_is or limit)
        named = [memory_use.Kept(*buffer) for buffer in largest] or memory_use.kept(
            config, _part(config, compiled.mesh)
        )
        return out | {
            "fits": False,
            "largest": grouped(named)[:LARGEST],
            "flops": None,
            "collectives": {},
            "roofline": None,
        }
    m = compiled.memory
    out["memory"] = _memory(
        kinds, m["arguments"], m["temporaries"], m["output"], m["aliased"], m["code"], limit
    )
    out["memory"]["peak_bytes"] = m["peak"]
    out["fits"] = out["memory"]["total_bytes"] <= limit
    module = hlo.parse(compiled.hlo)
    sums = hlo_collectives.collectives(module, mesh=compiled.mesh, slices=topology.slices)
    a_chip = hlo_work.dot_flops(module)
    work = hlo_work.dot_flops(module, passes=True)
    roofline = cost.roofline(work, hlo_work.bytes_accessed(module), sums, topology.chip)
    if not out["fits"]:
        found = hlo_work.largest_buffers(module, 4 * LARGEST)
        named = [memory_use.Kept(round(b.bytes), b.shape, b.op_name) for b in found]
        out["largest"] = grouped(named)[:LARGEST]
    return out | {
        "flops": round(a_chip * topology.count),
        "unknown_loops": len(module.unknown_loops),
        "collectives": by_kind(sums),
        "roofline": roofline._asdict(),
    }


def _of_estimate(guess: estimate.Estimate, model_flops, config, topology) -> dict[str, Any]:
    """The same for GPUs, by arithmetic: FLOPs of the model, without memory traffic."""
    limit = round(topology.chip.hbm_bytes)
    arguments = sum(guess.state_bytes.values())
    temporaries = sum(guess.temporaries.values())
    memory = _memory(guess.state_bytes, arguments, temporaries, 0, 0, 0, limit)
    memory["temporaries"] = guess.temporaries
    again = {"none": 3, "full": 4}.get(config.remat, 3.5) / 3  # passes, against three without
    done = round(model_flops * (again + (1 / 3 if config.microbatches > 1 else 0)))
    roofline = cost.roofline(done / topology.count, 0.0, guess.collectives, topology.chip)
    out = {
        "mesh": guess.mesh,
        "memory": memory,
        "fits": memory["total_bytes"] <= limit,
        "flops": done,
        "traced_flops": None,
        "collectives": by_kind(guess.collectives),
        "roofline": roofline._asdict(),
    }
    if not out["fits"]:
        out["largest"] = grouped(memory_use.kept(config, _part(config, guess.mesh)))[:LARGEST]
    return out


def _part(config: config_lib.Config, mesh: dict[str, int]) -> int:
    """Images that the towers of one chip see at a time."""
    return config.batch_size // (mesh["data"] * mesh["fsdp"] * config.microbatches)


def _memory(kinds, arguments, temporaries, output, aliased, code, limit) -> dict[str, Any]:
    """The memory table. Donated arguments and outputs share their bytes (`aliased`)."""
    total = arguments + output - aliased + temporaries + code
    return {
        "arguments": dict(kinds, padding=arguments - sum(kinds.values())),
        "arguments_bytes": arguments,
        "temporaries_bytes": temporaries,
        "output_bytes": output,
        "aliased_bytes": aliased,
        "code_bytes": code,
        "total_bytes": total,
        "limit_bytes": limit,
    }


def grouped(buffers: list[memory_use.Kept]) -> list[dict[str, Any]]:
    """Buffers of equal shape and origin as one entry with their number, largest sum first."""
    sums: dict[tuple[str, str, int], int] = {}
    for b in buffers:
        key = (b.shape, b.where, b.bytes)
        sums[key] = sums.get(key, 0) + 1
    entries = [
        {"count": n, "shape": shape, "bytes": size, "where": where}
        for (shape, where, size), n in sums.items()
    ]
    return sorted(entries, key=lambda e: -e["count"] * e["bytes"])


def by_kind(collectives: list[hlo_collectives.Collective]) -> dict[str, Any]:
    """kind -> count and bytes per chip and step: in all, by overlap with work, and by mesh axes."""
    out: dict[str, Any] = {}
    for c in collectives:
        entry = out.setdefault(
            c.kind,
            {
                "count": 0,
                "bytes": 0,
                "overlapped": {"count": 0, "bytes": 0},
                "sync": {"count": 0, "bytes": 0},
                "axes": [],
            },
        )
        for part in (entry, entry["overlapped" if c.overlapped else "sync"]):
            part["count"] += c.count
            part["bytes"] += round(c.bytes)
        axes = "x".join(c.axes) + (" between slices" if c.slices > 1 else "")
        if axes and axes not in entry["axes"]:
            entry["axes"].append(axes)
    return out


def _add_time(plan, config, topology, options: Options) -> None:
    """Speed, days, input rate and price; None where the program does not compile."""
    roof = plan["roofline"]
    plan["images_per_second"] = plan["images_per_second_at_most"] = None
    plan["input"] = plan["bill"] = None
    if roof is None:
        return
    work = max(roof["compute_s"], roof["hbm_s"]) / options.efficiency + roof["exposed_s"]
    step = max(work, roof["interconnect_s"], roof["dcn_s"])
    plan["efficiency"] = options.efficiency
    plan["step_seconds"] = step
    plan["images_per_second_at_most"] = config.batch_size / roof["step_s"]
    rate = plan["images_per_second"] = config.batch_size / step
    seconds = plan["run"]["images"] / rate
    plan["run"]["days"] = seconds / 86400
    a_host = rate / topology.hosts
    makes = topology.chip.host_cores * options.input_rate
    plan["input"] = {
        "cores_per_host": topology.chip.host_cores,
        "images_per_second_per_core": options.input_rate,
        "host_makes_images_per_second": makes,
        "host_needs_images_per_second": a_host,
        "cores_needed": a_host / options.input_rate,
        "image_bytes": options.image_bytes,
        "storage_bytes_per_second": rate * options.image_bytes,
        "storage_bytes_per_second_per_host": a_host * options.image_bytes,
        "cores_are_enough": makes >= a_host,
        "storage_is_enough": a_host * options.image_bytes <= options.storage_rate,
    }
    hours = topology.count * seconds / 3600
    plan["bill"] = {
        "chip_hours": hours,
        "price_per_chip_hour": options.price,
        "cost": None if options.price is None else hours * options.price,
    }


def find(config, topology, options: Options, line, base: dict[str, Any]) -> dict[str, Any]:
    """The points of `--search` and its two answers; `base` is the plan of the config itself."""
    mesh = estimate.mesh_sizes(config.mesh, topology.count, topology.slices)

    def ask(candidate: config_lib.Config) -> search.Answer | None:
        line.show(
            f"trying remat={candidate.remat} model.attention={candidate.model.attention}"
            f" mesh.fsdp={candidate.mesh.fsdp} loss.gather={candidate.loss.gather}"
            f" batch_size={candidate.batch_size}",
            now=True,
        )
        try:
            plan = base if candidate == config else make(candidate, topology, options, line)
        except compiler.TookTooLong as error:
            line.say(str(error))
            return None
        except compiler.CompilerFailed as error:  # of one point; others may serve
            line.say(str(error))
            return search.Answer(False, 0, base["memory"]["limit_bytes"], None, failed=True)
        memory = plan["memory"]
        return search.Answer(
            plan["fits"],
            memory["total_bytes"],
            memory["limit_bytes"],
            plan["images_per_second"],
        )

    shards = mesh["data"] * mesh["fsdp"]
    # One compile is spent: that of the plan.
    found = search.search(
        config, shards, ask, slices=topology.slices, max_compiles=search.MAX_COMPILES - 1
    )

    def entry(point: search.Point | None) -> dict[str, Any] | None:
        if point is None:
            return None
        return {
            **point.levers._asdict(),
            "images_per_chip": point.images_per_chip,
            "batch_size": point.images_per_chip * shards,
            **point.answer._asdict(),
        }

    return {
        "tried": [entry(p) for p in found.tried],
        "at_batch": entry(found.at_batch),
        "largest": entry(found.largest),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, plans, prints."""
    args = plan_parser().parse_args(arguments)
    # JAX would look for TPUs here, since libtpu is there.
    jax.config.update("jax_platforms", "cpu")
    config = config_file.load(args.config, args.overrides)
    topology = chips.parse_topology(args.topology)
    options = Options(
        examples=args.examples,
        price=args.price,
        efficiency=args.efficiency,
        input_rate=args.input_rate,
        image_bytes=args.image_bytes,
        storage_rate=args.storage_rate * 1e9,
        timeout=args.timeout,
    )
    line = progress.Line()
    try:
        plan = {
            "topology": args.topology,
            "overrides": args.overrides,
            **make(config, topology, options, line),
        }
        if args.search:
            plan["search"] = find(config, topology, options, line, plan)
    except compiler.CompilerFailed as error:
        line.close()
        print(error, file=sys.stderr)
        return 1
    line.close()
    print(plan_text.page(plan))
    if args.output:
        path = epath.Path(args.output)
        try:
            atomic.write_text(path, json.dumps(plan, indent=2) + "\n")
        except OSError as error:
            raise errors.UserError(f"--output: cannot write {path}: {error}") from None
    return 0


if __name__ == "__main__":
    process.run(main)
