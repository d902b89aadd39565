"""Formats a plan (`grain-jax plan`) as text."""

import textwrap
from typing import Any

WIDTH = 96
# Keys that trade memory against time; the first cost the least time (docs/performance.md).
REMEDIES = ("remat=qkv", "microbatches=2", "mesh.fsdp=8", "optim.moment_dtype=bfloat16")
_NOTES = {  # of memory
    "arguments": "held from step to step",
    "temporaries": "gradients, activations",
    "aliased": "of the output, written over the arguments",
    "code": "instructions of the program",
    "limit": "what a program may use",
    "peak": "as the compiler counts: it reuses some of the total",
}
Rows = list[tuple[str, str, str]]  # label, number, note


def amount(number: float, unit: str = "") -> str:
    """A number with three digits and an SI prefix: 1.52 G, 703 M."""
    power = max(0, min((len(f"{abs(number):.0f}") - 1) // 3, 6))
    value, prefix = number / 1000**power, " kMGTPE"[power].strip()
    digits = 0 if not power else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {prefix}{unit}".rstrip()


def gigabytes(size: float) -> str:
    """Bytes as GB with two decimals."""
    return f"{size / 1e9:.2f} GB"


def page(plan: dict[str, Any]) -> str:
    """The text of a plan."""
    unit = "chip" if plan["devices"] == plan["chips"] else "device"
    parts = [_heading(plan, unit), _section(f"Memory of one {unit}", _memory(plan["memory"]))]
    if largest := plan["largest"]:
        rows = [
            (f"{e['count']} x {e['shape']}", f"{gigabytes(e['bytes'])} each", e["where"][-44:])
            for e in largest
        ]
        parts.append(_section("The largest arrays that a step makes", rows))
    if plan["roofline"] is not None:
        parts += [
            _section("Matrix products of a step, all chips", _work(plan)),
            _section(f"What a {unit} sends in a step", _collectives(plan["collectives"])),
            _section("Time of a step", _times(plan)),
        ]
    return "\n\n".join(parts)


def _section(title: str, rows: Rows) -> str:
    """A title and a table; the numbers are right-aligned."""
    label_width, width = (max((len(row[n]) for row in rows), default=0) for n in range(2))
    lines = [
        f"  {label:<{max(label_width, 26)}}{number:>{width + 2}}  {note}".rstrip()
        for label, number, note in rows
    ]
    return "\n".join([f"-- {title} ".ljust(WIDTH, "-"), *lines])


def _heading(plan: dict[str, Any], unit: str) -> str:
    memory, mesh = plan["memory"], plan["mesh"]
    total, limit = memory["total_bytes"], memory["limit_bytes"]
    free = gigabytes(abs(limit - total))
    if plan["fits"]:
        verdict = f"FITS: {gigabytes(total)} of {gigabytes(limit)} a {unit}, {free} free"
    else:
        excess = f"{free} more than the {gigabytes(limit)} there are"
        remedies = ", ".join(f"--config.{remedy}" for remedy in REMEDIES)
        verdict = f"DOES NOT FIT: {gigabytes(total)} a {unit}, {excess}\nTry {remedies}"
    images = plan["batch_size"] // (mesh["data"] * mesh["fsdp"])
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    lines = [
        f"{plan['topology']}: {plan['chips']} chips, {plan['devices']} devices on"
        f" {plan['hosts']} host(s) in {plan['slices']} slice(s) or node(s)",
        f"mesh {axes}; {plan['batch_size']} images a step, {images} a {unit}",
        f"compiled for {plan['chip'].upper()} without one; {versions}",
        f"derived: {plan['derived']}" if plan["derived"] else "",
        "given: " + " ".join(plan["overrides"]) if plan["overrides"] else "",
    ]
    wrapped = [part for line in lines for part in textwrap.wrap(line, WIDTH)]
    return "\n".join([*wrapped, "", verdict])


def _memory(memory: dict[str, Any]) -> Rows:
    rows = []
    for key, note in (_NOTES | {"output": "", "total": ""}).items():
        if size := memory.get(f"{key}_bytes"):
            rows.append((key, gigabytes(size), note))
        if key == "arguments":
            rows += [(f"  {kind}", gigabytes(n), "") for kind, n in memory["arguments"].items()]
    return rows


def _work(plan: dict[str, Any]) -> Rows:
    model, compiled = plan["model_flops"], plan["flops"]
    rows = [
        ("model", amount(model, "FLOP"), "forward and backward, nothing computed twice"),
        ("compiled", amount(compiled, "FLOP"), f"{model / compiled:.0%} of the work is the model's"),
    ]
    note = "loop(s) of unknown length were counted once: the figures here are too low"
    loops = plan["unknown_loops"]
    return [*rows, ("", str(loops), note)] if loops else rows


def _collectives(collectives: dict[str, Any]) -> Rows:
    rows = []
    for kind, entry in collectives.items():
        hidden, waited = (amount(entry[key]["bytes"], "B") for key in ("overlapped", "sync"))
        note = f"{entry['count']} times: {hidden} overlapped, {waited} waited for"
        over = f"; over {', '.join(entry['axes'])}" if entry["axes"] else ""
        rows.append((kind, amount(entry["bytes"], "B"), note + over))
    return rows or [("nothing", "", "")]


def _times(plan: dict[str, Any]) -> Rows:
    roof = plan["roofline"]
    time = lambda name: f"{roof[name] * 1e3:.3g} ms"
    traffic = f"{amount(plan['hbm_bytes'], 'B')} to and from the chip's memory"
    rate = f"{plan['images_per_second_at_most']:,.0f}"
    kernels = plan["kernels"]
    runs = ", ".join(f"{count} by {source}" for source, count in kernels["runs"].items())
    compute = f"matrix products at the chip's printed peak{', and kernels' * bool(runs)}"
    row = ("  kernels", f"{kernels['seconds'] * 1e3:.3g} ms", f"of it: {runs}")
    return [
        ("compute", time("compute_s"), compute),
        *([row] if runs else []),
        ("HBM", time("hbm_s"), traffic),
        ("interconnect", time("interconnect_s"), "between the chips of a slice or node"),
        ("network", time("dcn_s"), "between slices or nodes"),
        ("waiting", time("exposed_s"), "for transfers that no work hides"),
        ("step, at best", time("step_s"), f"bound by {roof['bound']}"),
        ("images/s, at most", rate, "no run can beat it"),
        ("MFU, at most", f"{plan['mfu_at_most']:.1%}", "the model's products, of the peak"),
    ]
