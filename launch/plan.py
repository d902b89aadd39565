"""Plans a run for chips that this machine does not have: grain-jax plan --config X --topology v5e:16x16

The very step that `grain_jax.train` runs is compiled for them on this machine's CPU: by libtpu for TPUs, by the
CUDA plugin of JAX for GPUs (h100:8x2). Without that plugin a plan for GPUs is arithmetic, labelled ESTIMATE.
`--all-chips` plans for one topology of each kind, and tabulates.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from etils import epath

from grain_jax import config as config_lib
from grain_jax.cli import config_file, process
from grain_jax.core import atomic, errors, nearest, progress
from grain_jax.input_pipeline import derived
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
from grain_jax.launch.arguments import Plan
from grain_jax.launch.arguments import PlanOptions as Options
from grain_jax.training import flops, memory_need, phases

PER_MILLION = 1_000_000  # examples, where nobody said how many there are
LARGEST = 6  # buffers named when memory runs out
# Keys that trade memory against time.
LEVERS = (
    "model.attention",
    "model.mlp",
    "remat",
    "microbatches",
    "mesh.fsdp",
    "mesh.tensor",
    "optim.moment_dtype",
    "loss.tile",
    "loss.gather",
)
# What --all-chips plans for.
ALL_CHIPS = (
    "v5e:16x16",
    "v6e:8x8",
    "v6e:16x16",
    "v5p:4x4x4",
    "tpu7x:4x4x4",
    "h100:8",
    "h200:8",
    "b200:8",
    "gb200:72",
)
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
    place = derived.Place(mesh["data"] * mesh["fsdp"], lanes)
    config, derived_from = derived.planned(config, place)
    total_steps, per_epoch, examples, made_up = length(config, options.examples)
    not_compiled = None if topology.chip.is_tpu else compiler.missing(topology.chip)
    plan: dict[str, Any] = {
        "chips": topology.chips,
        "devices": topology.count,
        "hosts": topology.hosts,
        "slices": topology.slices,
        "chip": topology.chip.name,
        "estimate": not_compiled is not None,
        "not_compiled": not_compiled,
        "not_known": [] if topology.chip.is_tpu else list(NOT_KNOWN),
        "batch_size": config.batch_size,
        "levers": levers(config),
        "derived": derived_from,
    }
    made = []
    for phase in phases.of(config, total_steps):
        part = phases.at(config, phase)
        per_image = flops.per_image(part)
        model_flops = round(per_image.train * config.batch_size)
        if not_compiled is None:
            of_run = dict(total_steps=total_steps, steps_per_epoch=per_epoch, phase=phase.key)
            found = compiler.compile_step(
                config, topology, **of_run, timeout=options.timeout, line=line
            )
            cached = ", from the cache" if found.cached else ""
            line.show(f"compiled in {found.seconds:.0f} s{cached}", now=True)
            of_phase = _of_compiled(found, part, topology) | {"versions": found.versions}
        else:
            line.show(f"estimating: {not_compiled}", now=True)
            found = estimate.of_gpus(config, topology, phase)
            of_phase = _of_estimate(found, per_image, part, topology)
        made.append((phase, {"model_flops": model_flops} | of_phase))
    plan |= _together(made, total_steps)
    plan["checkpoint"] = {
        "bytes": found.checkpoint_bytes,
        # Every host writes its share.
        "seconds": found.checkpoint_bytes / (options.storage_rate * topology.hosts),
    }
    plan["run"] = {
        "total_steps": total_steps,
        "examples": examples,
        "per_million": made_up,
        "images": total_steps * config.batch_size,
    }
    return plan | _times(plan, topology, options)


def levers(config: config_lib.Config) -> dict[str, Any]:
    """The keys that trade memory against time, with their values."""
    values = config_lib.flatten(dataclasses.asdict(config))
    return {key: values[key] for key in LEVERS}


def _together(
    made: Sequence[tuple[phases.Phase, dict[str, Any]]], total_steps: int
) -> dict[str, Any]:
    """The phases of a run as one: the largest memory; FLOPs and rooflines are means over the steps.

    Of several phases, `phases` has the steps, the terms that are off, the share of patches, the sequence length,
    memory, FLOPs and the time of a step at best of each.
    """
    if len(made) == 1:
        return made[0][1]
    found = [phase for phase, _ in made]
    steps, shares = phases.steps(found, total_steps), phases.shares(found, total_steps)
    plans = [plan for _, plan in made]

    def mean(values):
        found = list(values)
        if None in found:
            return None
        return sum(share * value for share, value in zip(shares, found))

    out = dict(max(plans, key=lambda plan: plan["memory"]["total_bytes"]))
    out["fits"] = all(plan["fits"] for plan in plans)
    for key in ("model_flops", "traced_flops", "flops"):
        value = mean(plan[key] for plan in plans)
        out[key] = None if value is None else round(value)
    out["rooflines"] = [(share, plan["roofline"]) for share, plan in zip(shares, plans)]
    if all(plan["roofline"] for plan in plans):
        seconds = [key for key in out["roofline"] if key != "bound"]
        means = {key: mean(plan["roofline"][key] for plan in plans) for key in seconds}
        longest = max(plans, key=lambda plan: plan["roofline"]["step_s"])
        out["roofline"] = means | {"bound": longest["roofline"]["bound"]}
    else:
        out["roofline"] = None
    out["phases"] = [
        {
            "steps": [own.start, own.stop - 1],
            "off": sorted(phase.off),
            "keep": phase.keep,
            "length": phase.length,
            "total_bytes": plan["memory"]["total_bytes"],
            "model_flops": plan["model_flops"],
            "flops": plan["flops"],
            "step_s": plan["roofline"] and plan["roofline"]["step_s"],
        }
        for (phase, plan), own in zip(made, steps)
    ]
    return out


def _of_compiled(compiled: compiler.Compiled, config, topology) -> dict[str, Any]:
    """Memory, FLOPs, collectives and roofline of a compiled step, or of one that ran out of memory."""
    limit, kinds = round(topology.chip.hbm_bytes), compiled.state_bytes
    out: dict[str, Any] = {"mesh": compiled.mesh, "traced_flops": compiled.traced_flops}
    if compiled.out_of_memory is not None:
        total, there_is, largest = compiler.parse_out_of_memory(compiled.out_of_memory)
        arguments = sum(kinds.values())
        named = [memory_need.Kept(*buffer) for buffer in largest]
        return out | {
            "memory": _memory(kinds, there_is or limit, arguments, total - arguments),
            "fits": False,
            "largest": _largest(named or _kept(config, compiled.mesh)),
            "flops": None,
            "collectives": {},
            "roofline": None,
        }
    module = hlo.parse(compiled.hlo)
    sums = hlo_collectives.collectives(module, mesh=compiled.mesh, slices=topology.slices)
    work = hlo_work.dot_flops(module, passes=True)
    out["memory"] = _memory(kinds, limit, **compiled.memory)
    out["flops"] = round(hlo_work.dot_flops(module) * topology.count)
    out["unknown_loops"] = len(module.unknown_loops)
    return out | _costs(out, config, topology, work, hlo_work.bytes_accessed(module), sums)


def _of_estimate(
    guess: estimate.Estimate, per_image: flops.PerImage, config, topology
) -> dict[str, Any]:
    """The same for GPUs, by arithmetic: FLOPs of the model, without memory traffic.

    `remat` computes the layers of the model again, not the local terms and the teacher.
    """
    limit = round(topology.chip.hbm_bytes)
    arguments, temporaries = sum(guess.state_bytes.values()), sum(guess.temporaries.values())
    layers = per_image.image + per_image.text + per_image.decoder
    again = {"none": 0.0, "full": 1.0}.get(config.remat, 0.5) * layers
    if config.microbatches > 1:
        again += per_image.forward
    done = round((per_image.train + again) * config.batch_size)
    memory = _memory(guess.state_bytes, limit, arguments, temporaries)
    memory["temporaries"] = guess.temporaries
    out = {"mesh": guess.mesh, "memory": memory, "flops": done, "traced_flops": None}
    return out | _costs(out, config, topology, done / topology.count, 0.0, guess.collectives)


def _costs(out: dict[str, Any], config, topology, work, traffic, sums) -> dict[str, Any]:
    """Whether it fits, and with what; what a step sends, and its roofline."""
    fits = out["memory"]["total_bytes"] <= out["memory"]["limit_bytes"]
    return {
        "fits": fits,
        "collectives": by_kind(sums),
        "roofline": cost.roofline(work, traffic, sums, topology.chip)._asdict(),
    } | ({} if fits else {"largest": _largest(_kept(config, out["mesh"]))})


def _kept(config: config_lib.Config, mesh: dict[str, int]) -> list[memory_need.Kept]:
    """What one chip keeps for the backward pass of the images that its towers see at a time."""
    parts = mesh["data"] * mesh["fsdp"] * config.microbatches
    return memory_need.kept(config, config.batch_size // parts)


def _memory(
    kinds, limit, arguments, temporaries, output=0, aliased=0, code=0, peak=None
) -> dict[str, Any]:
    """The memory table. Donated arguments and outputs share their bytes (`aliased`)."""
    table = {
        "arguments": dict(kinds, padding=arguments - sum(kinds.values())),
        "arguments_bytes": arguments,
        "temporaries_bytes": temporaries,
        "output_bytes": output,
        "aliased_bytes": aliased,
        "code_bytes": code,
        "total_bytes": arguments + output - aliased + temporaries + code,
        "limit_bytes": limit,
    }
    return table if peak is None else table | {"peak_bytes": peak}


def _largest(buffers: Iterable[memory_need.Kept]) -> list[dict[str, Any]]:
    """Buffers of equal shape and origin as one entry with their number, largest sum first."""
    entries = [
        {"count": n, "shape": b.shape, "bytes": b.bytes, "where": b.where}
        for b, n in Counter(buffers).items()
    ]
    return sorted(entries, key=lambda e: -e["count"] * e["bytes"])[:LARGEST]


def by_kind(collectives: list[hlo_collectives.Collective]) -> dict[str, Any]:
    """kind -> count and bytes per chip and step: in all, by overlap with work, and by mesh axes."""
    out: dict[str, Any] = {}
    nothing = {"count": 0, "bytes": 0}
    for c in collectives:
        parts = {"overlapped": {**nothing}, "sync": {**nothing}, "axes": []}
        entry = out.setdefault(c.kind, {**nothing, **parts})
        for part in (entry, entry["overlapped" if c.overlapped else "sync"]):
            part["count"] += c.count
            part["bytes"] += round(c.bytes)
        axes = "x".join(c.axes) + (" between slices" if c.slices > 1 else "")
        if axes and axes not in entry["axes"]:
            entry["axes"].append(axes)
    return out


def _times(plan, topology, options: Options) -> dict[str, Any]:
    """Speed, days, input rate and price; None where the program does not compile."""
    roof = plan["roofline"]
    of_phases = plan.pop("rooflines", [(1.0, roof)])
    if roof is None:
        speed = ("images_per_second", "images_per_second_at_most", "mfu_at_most")
        return dict.fromkeys((*speed, "input", "bill"))
    step = 0.0
    for share, one in of_phases:
        work = max(one["compute_s"], one["hbm_s"]) / options.efficiency + one["exposed_s"]
        step += share * max(work, one["interconnect_s"], one["dcn_s"])
    rate = plan["batch_size"] / step
    seconds = plan["run"]["images"] / rate
    a_host = rate / topology.hosts
    makes = topology.chip.host_cores * options.input_rate
    peak = topology.count * topology.chip.bf16_flops
    return {
        "efficiency": options.efficiency,
        "step_seconds": step,
        "images_per_second_at_most": plan["batch_size"] / roof["step_s"],
        "mfu_at_most": plan["model_flops"] / (roof["step_s"] * peak),
        "images_per_second": rate,
        "run": plan["run"] | {"days": seconds / 86400},
        "input": {
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
        },
        "bill": _bill(topology.chips * seconds / 3600, options.price_of(topology.chip.name)),
    }


def _bill(hours: float, price: float | None) -> dict[str, Any]:
    """The chip-hours of the run, and what they cost at the price of one."""
    cost = None if price is None else hours * price
    return {"chip_hours": hours, "price_per_chip_hour": price, "cost": cost}


def find(config, topology, options: Options, line, base: dict[str, Any]) -> dict[str, Any]:
    """The points of `--search` and its two answers; `base` is the plan of the config itself."""
    shards = base["mesh"]["data"] * base["mesh"]["fsdp"]

    def ask(candidate: config_lib.Config) -> search.Answer | None:
        tried = levers(candidate) | {"batch_size": candidate.batch_size}
        keys = ("remat", "model.attention", "mesh.fsdp", "loss.gather", "batch_size")
        line.show(f"trying {' '.join(f'{key}={tried[key]}' for key in keys)}", now=True)
        try:
            plan = base if candidate == config else make(candidate, topology, options, line)
        except compiler.TookTooLong as error:
            line.say(str(error))
            return None
        except compiler.CompilerFailed as error:  # of one point; others may serve
            line.say(str(error))
            return search.Answer(False, 0, base["memory"]["limit_bytes"], None, failed=True)
        sizes = (plan["memory"][key] for key in ("total_bytes", "limit_bytes"))
        return search.Answer(plan["fits"], *sizes, plan["images_per_second"])

    # One compile is spent: that of the plan.
    compiles = search.MAX_COMPILES - 1
    found = search.search(config, shards, ask, slices=topology.slices, max_compiles=compiles)

    def entry(point: search.Point | None) -> dict[str, Any] | None:
        if point is None:
            return None
        images = point.images_per_chip
        sizes = {"images_per_chip": images, "batch_size": images * shards}
        return point.levers._asdict() | sizes | point.answer._asdict()

    return {
        "tried": [entry(p) for p in found.tried],
        "at_batch": entry(found.at_batch),
        "largest": entry(found.largest),
    }


def sized(config: config_lib.Config, topology: chips.Topology, images: int | None):
    """The config with so many images a device (None: as it is). Raises ShardingError: the mesh does not fit."""
    if images is None:
        return config
    mesh = estimate.mesh_sizes(config.mesh, topology.count, topology.slices)
    return dataclasses.replace(config, batch_size=images * mesh["data"] * mesh["fsdp"])


def everywhere(config: config_lib.Config, args: Plan) -> dict[str, Any]:
    """The plans for `ALL_CHIPS`, as `--output` has them; written there after each.

    Returns:
      `request`, all that the plans depend on but prices; `plans`, topology -> plan, or {"failed": why there is none}.
    """
    if args.output:
        with _writing(args.output):
            atomic.check(args.output)
    request = _request(config, args)
    plans = _known(args.output, request)
    found: dict[str, Any] = {"request": request, "plans": plans}
    to_do = [name for name in ALL_CHIPS if name not in plans]
    began = time.monotonic()
    for done, name in enumerate(to_do):
        spent = time.monotonic() - began
        left = f", ETA {progress.duration(spent / done * (len(to_do) - done))}" if done else ""
        line = progress.Line(f"{done + 1}/{len(to_do)}{left}: ")
        topology = chips.parse_topology(name)
        line.show(f"planning for {name}", now=True)
        try:
            own = sized(config, topology, args.images_per_device)
            plan = make(own, topology, args.assumptions, line)
        except (errors.UserError, compiler.CompilerFailed) as error:
            plan = {"failed": "; ".join(str(error).splitlines())}
        line.close()
        plans[name] = {"topology": name, "overrides": args.overrides} | plan
        _write(args.output, found)
    for plan in plans.values():  # those of an earlier start may have had other prices
        if plan.get("bill"):
            price = args.assumptions.price_of(plan["chip"])
            plan["bill"] = _bill(plan["bill"]["chip_hours"], price)
    found["plans"] = {name: plans[name] for name in ALL_CHIPS}
    _write(args.output, found)
    return found


def _request(config: config_lib.Config, args: Plan) -> dict[str, Any]:
    """All that plans depend on but prices: config, assumptions, this package, what compiles, and its flags."""
    options = dataclasses.asdict(args.assumptions)
    sources = hashlib.sha256()
    for pattern in ("grain_jax/*.py", "grain_jax/*/*.py", "launch/*.py"):
        for path in sorted(compiler.ROOT.glob(pattern)):
            sources.update(path.read_bytes())
    request = {
        "config": json.loads(config_lib.to_json(config)),
        "images_per_device": args.images_per_device,
        "assumptions": {key: options[key] for key in options if key not in ("price", "timeout")},
        "sources": sources.hexdigest(),
        "versions": {"jax": jax.__version__, **compiler.versions_of("tpu", "cuda")},
        "flags": {flag: os.environ.get(flag) for flag in compiler.FLAGS},
    }
    return json.loads(json.dumps(request))


def _known(output: str | None, request: dict[str, Any]) -> dict[str, Any]:
    """The plans that an earlier start wrote for the same request; what failed is tried again."""
    try:
        found = json.loads(epath.Path(output).read_text()) if output else {}
        plans = found["plans"] if found.get("request") == request else {}
    except (OSError, ValueError, AttributeError, KeyError):
        plans = {}
    return {name: plan for name, plan in plans.items() if "failed" not in plan}


def _write(output: str | None, found: dict[str, Any]) -> None:
    if output:
        with _writing(output):
            atomic.write_text(output, json.dumps(found, indent=2) + "\n")


@contextlib.contextmanager
def _writing(output: str):
    """Errors inside become one line."""
    try:
        yield
    except OSError as error:
        raise errors.UserError(f"--output: cannot write {output}: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, plans, prints."""
    args = Plan.parse(arguments)
    for chip in args.assumptions.price or {}:
        if chip and chip not in chips.CHIPS:
            raise errors.UserError(f"--price: {nearest.choice(chip, chips.CHIPS)}")
    # JAX would look for TPUs here, since libtpu is there.
    jax.config.update("jax_platforms", "cpu")
    config = config_file.load(args.config, args.overrides)
    if args.all_chips:
        plans = everywhere(config, args)["plans"]
        print(plan_text.table(plans.values()))
        return 0 if any("failed" not in plan for plan in plans.values()) else 1
    topology = chips.parse_topology(args.topology)
    config = sized(config, topology, args.images_per_device)
    line = progress.Line()
    try:
        plan = {
            "topology": args.topology,
            "overrides": args.overrides,
            **make(config, topology, args.assumptions, line),
        }
        if args.search:
            plan["search"] = find(config, topology, args.assumptions, line, plan)
    except compiler.CompilerFailed as error:
        line.close()
        print(error, file=sys.stderr)
        return 1
    line.close()
    print(plan_text.page(plan))
    _write(args.output, plan)
    return 0


if __name__ == "__main__":
    process.run(main)
