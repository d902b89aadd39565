"""Formats a plan (`grain-jax plan`) as text."""

import textwrap
from typing import Any

from grain_jax.core import progress

WIDTH = 96
# Keys that trade memory against time; when memory runs out, the first cost the least time (docs/performance.md).
REMEDIES = ("remat=qkv", "microbatches=2", "mesh.fsdp=8", "optim.moment_dtype=bfloat16")
LEVERS = (
    *(remedy.partition("=")[0] for remedy in REMEDIES),
    *("loss.tile", "model.attention", "model.mlp", "mesh.tensor", "loss.gather"),
)
_PARTS = {  # of memory
    "parameters": "float32",
    "moments": "Adam's two",
    "ema": "average of the parameters",
    "batch": "images, texts, boxes",
    "padding": "to the chip's tiles",
}


def amount(number: float, unit: str = "") -> str:
    """A number with three digits and an SI prefix: 1.52 G, 703 M."""
    power = max(0, min((len(f"{abs(number):.0f}") - 1) // 3, 6))
    value, prefix = number / 1000**power, " kMGTPE"[power].strip()
    digits = 0 if not power else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {prefix}{unit}".rstrip()


def gigabytes(size: float) -> str:
    """Bytes as GB with two decimals."""
    return f"{size / 1e9:.2f} GB"


def seconds(time: float) -> str:
    """A time below one second in ms, a longer one in hours, minutes and seconds."""
    return f"{time * 1e3:.3g} ms" if time < 1 else progress.duration(time)


def page(plan: dict[str, Any]) -> str:
    """The text of a plan."""
    parts = [_heading(plan), _memory(plan)]
    if plan["largest"]:
        parts.append(_largest(plan))
    if plan["flops"] is not None:
        parts += [_work(plan), _collectives(plan), _times(plan)]
    return "\n\n".join("\n".join(part) for part in parts)


def _unit(plan) -> str:
    return "chip" if plan["devices"] == plan["chips"] else "device"


def _section(title: str) -> str:
    return f"-- {title} ".ljust(WIDTH, "-")


def _rows(*rows: str) -> list[str]:
    """Formats rows of label | number | note; the numbers are right-aligned."""
    cells = [row.split("|") for row in rows]
    wide = max(len(number) for _, number, _ in cells)
    return [f"  {label:<26}{number:>{wide}}  {note}".rstrip() for label, number, note in cells]


def _heading(plan) -> list[str]:
    memory, mesh, unit = plan["memory"], plan["mesh"], _unit(plan)
    total, limit = memory["total_bytes"], memory["limit_bytes"]
    free = gigabytes(abs(limit - total))
    if plan["fits"]:
        verdict = f"FITS: {gigabytes(total)} of {gigabytes(limit)} a {unit}, {free} free"
    else:
        excess = f"{free} more than the {gigabytes(limit)} there are"
        remedies = ", ".join(f"--config.{remedy}" for remedy in REMEDIES)
        verdict = f"DOES NOT FIT: {gigabytes(total)} a {unit}, {excess}\nTry {remedies}"
    images = plan["batch_size"] // (mesh["data"] * mesh["fsdp"])
    slices = f" in {plan['slices']} slices or nodes" if plan["slices"] > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    notes = [f"compiled for {plan['chip'].upper()} without one; {versions}"]
    if plan["derived"]:
        notes.append("derived: " + plan["derived"])
    if plan["overrides"]:
        notes.append("given: " + " ".join(plan["overrides"]))
    levers = " ".join(f"{key}={value}" for key, value in plan["levers"].items())
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    devices = f", {plan['devices']} devices," if unit == "device" else ""
    lines = [
        f"{plan['topology']}: {plan['chips']} chips{devices} on {plan['hosts']} host(s){slices}",
        f"mesh {axes}; {plan['batch_size']} images a step, {images} a {unit}",
        *(line for text in (levers, *notes) for line in textwrap.wrap(text, WIDTH)),
        "",
        verdict,
    ]
    if not plan["fits"] and memory.get("peak_bytes", total) <= limit:
        peak = gigabytes(memory["peak_bytes"])
        lines.append(
            f"(the compiler accepts it, with a peak of {peak}; the sum is the safe side: try it on one host)"
        )
    return lines


def _memory(plan) -> list[str]:
    memory, size = plan["memory"], lambda key: gigabytes(memory[f"{key}_bytes"])
    rows = [f"arguments|{size('arguments')}|held from step to step"]
    rows += [
        f"  {kind}|{gigabytes(count)}|{_PARTS[kind]}"
        for kind, count in memory["arguments"].items()
        if count or kind in ("parameters", "moments")
    ]
    rows.append(f"temporaries|{size('temporaries')}|gradients, activations")
    if memory["output_bytes"]:
        output = gigabytes(memory["output_bytes"] - memory["aliased_bytes"])
        rows.append(f"output|{output}|{size('aliased')} more is written over the arguments")
    if memory["code_bytes"]:
        rows.append(f"program|{size('code')}|its instructions")
    note = ""
    if "peak_bytes" in memory:
        note = f"the compiler's own peak is {size('peak')}: it reuses some of it"
    rows.append(f"total|{size('total')}|{note}")
    rows.append(f"limit|{size('limit')}|of a {_unit(plan)}, what a program may use")
    return [_section(f"Memory of one {_unit(plan)}"), *_rows(*rows)]


def _largest(plan) -> list[str]:
    rows = []
    for entry in plan["largest"]:
        times = f"{entry['count']} x " if entry["count"] > 1 else ""
        where = entry["where"] if len(entry["where"]) <= 44 else "..." + entry["where"][-41:]
        size = gigabytes(entry["count"] * entry["bytes"])
        rows.append((f"{times}{entry['shape']}", size, where))
    wide = max(len(row[0]) for row in rows)
    lines = [f"  {shape:<{wide}}  {size:>8}  {where}" for shape, size, where in rows]
    return [_section("The largest arrays that a step makes, not all at one time"), *lines]


def _work(plan) -> list[str]:
    model, done = plan["model_flops"], plan["flops"]
    lines = _rows(
        f"model|{amount(model, 'FLOP')}|forward and backward, nothing computed twice",
        f"compiled|{amount(done, 'FLOP')}|{model / done:.0%} of the work is the model's",
    )
    if plan["unknown_loops"]:
        lines.append(
            f"  {plan['unknown_loops']} loop(s) of unknown length were counted once: the figures here are too low"
        )
    return [_section("Matrix products of a step, all chips"), *lines]


def _collectives(plan) -> list[str]:
    title = _section(f"What a {_unit(plan)} sends in a step")
    if not plan["collectives"]:
        return [title, f"  nothing: no {_unit(plan)} waits for another"]
    lines = [f"  {'':<20}{'count':>7}{'bytes':>12}   {'overlapped':>12}{'waited for':>12}   over"]
    for kind, entry in plan["collectives"].items():
        hidden, waited = (amount(entry[key]["bytes"], "B") for key in ("overlapped", "sync"))
        sent = f"{entry['count']:>7}{amount(entry['bytes'], 'B'):>12}"
        over = ", ".join(entry["axes"])
        lines.append(f"  {kind:<20}{sent}   {hidden:>12}{waited:>12}   {over}")
    return [title, *lines]


def _times(plan) -> list[str]:
    roof = plan["roofline"]
    rows = [
        f"compute|{seconds(roof['compute_s'])}|matrix products at the chip's printed peak",
        f"HBM|{seconds(roof['hbm_s'])}|{amount(plan['hbm_bytes'], 'B')} to and from the chip's memory",
        f"interconnect|{seconds(roof['interconnect_s'])}|between the chips of a slice or node",
    ]
    if plan["slices"] > 1:
        rows.append(f"network|{seconds(roof['dcn_s'])}|between slices or nodes")
    rows += [
        f"waiting|{seconds(roof['exposed_s'])}|of these transfers, not hidden behind work",
        f"step, at best|{seconds(roof['step_s'])}|bound by {roof['bound']}",
        f"images/s, at most|{plan['images_per_second_at_most']:,.0f}|no run can beat it",
        f"MFU, at most|{plan['mfu_at_most']:.1%}|the model's products at the peak, of that step",
    ]
    return [_section("Time of a step"), *_rows(*rows)]
