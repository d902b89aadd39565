"""Formats a plan (`grain-jax plan`) as text."""

import textwrap
from collections.abc import Iterable
from typing import Any

from grain_jax.core import progress

WIDTH = 96
SHORT_SECONDS = 1e-3  # a step has hundreds of operations, each of which takes microseconds to start
# Config key -> values and effect, to try when memory runs out; the first cost the least time.
REMEDIES = {
    "remat": "qkv or full: computes activations again in the backward pass",
    "microbatches": "2, 4, ...: fewer images at a time, the same loss",
    "mesh.fsdp": "2, 4, ...: cuts parameters and moments over chips",
    "optim.moment_dtype": "bfloat16: halves the first moment",
    "loss.tile": "512: smaller tiles of similarities",
}
_PARTS = {  # of memory
    "parameters": "float32",
    "moments": "Adam's two",
    "ema": "average of the parameters",
    "teacher": "parameters of the teacher",
    "batch": "images, texts, boxes",
    "padding": "to the chip's tiles",
    "gradients": "float32",
    "activations": "kept for the backward pass",
    "layer": "one layer, view or teacher at work",
    "losses": "tiles of similarities, columns on the ring",
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
    """The text of a plan that `plan.make` returned."""
    parts = [_heading(plan), _memory(plan)]
    if plan.get("phases"):
        parts.append(_phases(plan))
    if not plan["fits"]:
        parts.append(_out_of_memory(plan))
    if plan["flops"] is not None:
        parts += [_work(plan), _collectives(plan)]
    if plan["roofline"] is not None:
        parts.append(_speed(plan))
    parts.append(_input(plan))
    if plan["bill"] is not None and not _is_short(plan):
        parts.append(_bill(plan))
    if plan.get("search"):
        parts.append(_search(plan))
    return "\n\n".join("\n".join(part) for part in parts)


def table(plans: Iterable[dict[str, Any]]) -> str:
    """A row for each plan of `--all-chips`; that of one that failed, or does not fit, says so in words."""
    form = "{:<12}{:>8}{:>10}{:>10}{:>12}{:>5}{:>17}{:>11}{}"
    above = ("", "", "images", "step, at", "images/s", "MFU", "GB of the", "cost of", "")
    below = ("topology", "devices", "a device", "best", "at most", "", "limit", "1 G images", "")
    lines, estimated, unpriced = [form.format(*above), form.format(*below)], False, False
    for plan in plans:
        if "failed" in plan:
            text = f"{plan['topology']:<12}  failed: {plan['failed']}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * 14)
            continue
        memory, parts = plan["memory"], plan["mesh"]["data"] * plan["mesh"]["fsdp"]
        of_limit = f"{memory['total_bytes'] / 1e9:.2f} of {memory['limit_bytes'] / 1e9:.2f}"
        first = (plan["topology"], plan["devices"], plan["batch_size"] // parts)
        note = "  ESTIMATE" if plan["estimate"] else ""
        estimated |= plan["estimate"]
        if not plan["fits"]:
            row = "{:<12}{:>8}{:>10}{:>27}{:>17}{:>11}{}"
            lines.append(row.format(*first, "does not fit", of_limit, "", note).rstrip())
            continue
        rate, price = plan["images_per_second_at_most"], plan["bill"]["price_per_chip_hour"]
        cost = "-" if price is None else f"{plan['chips'] * price / 3600 * 1e9 / rate:,.0f}"
        unpriced |= price is None
        step, mfu = seconds(plan["roofline"]["step_s"]), f"{plan['mfu_at_most']:.0%}"
        lines.append(form.format(*first, step, f"{rate:,.0f}", mfu, of_limit, cost, note).rstrip())
    lines += ["", "Times, rates and costs are bounds: no run can beat them. A device is a chip, of"]
    lines.append("tpu7x half of one; prices are of a chip.")
    if estimated:
        lines.append(
            "ESTIMATE: by arithmetic, without the traffic with HBM, which may bound it instead."
        )
    if unpriced:
        lines.append("No price, no cost: --price v5e=1.2,v6e=2.7 gives those of a chip-hour.")
    return "\n".join(lines)


def _unit(plan) -> str:
    return "chip" if plan["devices"] == plan["chips"] else "device"


def _section(title: str, plan=None) -> str:
    label = " (ESTIMATE)" if plan and plan["estimate"] else ""
    return f"-- {title}{label} ".ljust(WIDTH, "-")


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
        there = f"{free} more than the {gigabytes(limit)} there are"
        verdict = f"DOES NOT FIT: {gigabytes(total)} a {unit}, {there}"
    images = plan["batch_size"] // (mesh["data"] * mesh["fsdp"])
    slices = f" in {plan['slices']} slices or nodes" if plan["slices"] > 1 else ""
    if plan["estimate"]:
        how = ["ESTIMATE by arithmetic: nothing was compiled; within a fifth of what was"]
        how.append(plan["not_compiled"])
    else:
        by = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
        how = [f"compiled for {plan['chip'].upper()} without one; {by}"]
        how += [f"not known: {what}" for what in plan["not_known"]]
    if plan["derived"]:
        how.append("derived: " + plan["derived"])
    if plan["overrides"]:
        how.append("given: " + " ".join(plan["overrides"]))
    levers = " ".join(f"{key}={value}" for key, value in plan["levers"].items())
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    devices = f", {plan['devices']} devices," if unit == "device" else ""
    lines = [
        f"{plan['topology']}: {plan['chips']} chips{devices} on {plan['hosts']} host(s){slices}",
        f"mesh {axes}; {plan['batch_size']} images a step, {images} a {unit}",
        *(line for text in (levers, *how) for line in textwrap.wrap(text, WIDTH)),
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
    parts = memory.get("temporaries", {})
    rows += [f"  {kind}|{gigabytes(n)}|{_PARTS[kind]}" for kind, n in parts.items()]
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
    return [_section(f"Memory of one {_unit(plan)}", plan), *_rows(*rows)]


def _phases(plan) -> list[str]:
    rows = []
    for phase in plan["phases"]:
        first, last = phase["steps"]
        done = phase["flops"] or phase["model_flops"]
        what = [f"{amount(done, 'FLOP')} a step"]
        if phase["step_s"] is not None:
            what.append(f"at best {seconds(phase['step_s'])}")
        if phase["length"] is not None:
            what.append(f"length {phase['length']:,}")
        if phase["keep"] != 1:
            what.append(f"keep {phase['keep']:g}")
        note = "; ".join([*what, f"off: {', '.join(phase['off']) or 'nothing'}"])
        rows.append(f"steps {first:,} to {last:,}|{gigabytes(phase['total_bytes'])}|{note}")
    what = "Phases: above is the largest memory, below are means over the steps"
    return [_section(what, plan), *_rows(*rows)]


def _out_of_memory(plan) -> list[str]:
    rows = []
    for entry in plan["largest"]:
        times = f"{entry['count']} x " if entry["count"] > 1 else ""
        where = entry["where"] if len(entry["where"]) <= 44 else "..." + entry["where"][-41:]
        size = gigabytes(entry["count"] * entry["bytes"])
        rows.append((f"{times}{entry['shape']}", size, where))
    wide = max((len(row[0]) for row in rows), default=0)
    lines = [f"  {shape:<{wide}}  {size:>8}  {where}" for shape, size, where in rows]
    levers = plan["levers"]
    change = [f"  --config.{key:<20} (is {levers[key]}) {what}" for key, what in REMEDIES.items()]
    return [_section("The largest arrays, and what to change"), *lines, "", *change]


def _work(plan) -> list[str]:
    model, done, traced = plan["model_flops"], plan["flops"], plan["traced_flops"]
    rows = [f"model|{amount(model, 'FLOP')}|forward and backward, nothing computed twice"]
    note = f"{model / done:.0%} of the work is the model's"
    if traced is None:
        note += " (ESTIMATE)"
    else:
        parts = plan["levers"]["microbatches"]
        parts = f", {parts} micro-batches" if parts > 1 else ""
        again = f"recomputed (remat={plan['levers']['remat']}{parts})"
        if traced < model and plan["not_known"]:  # of GPUs
            again = "nothing is counted inside of library calls, such as cuDNN's attention"
        again = f"{traced / model - 1:+.1%}: {again}"
        rows.append(f"as written|{amount(traced, 'FLOP')}|{again}")
        note = f"{done / traced - 1:+.1%} by the compiler; {note}"
    lines = _rows(*rows, f"compiled|{amount(done, 'FLOP')}|{note}")
    if plan.get("unknown_loops"):
        lines.append(
            f"  {plan['unknown_loops']} loop(s) of unknown length were counted once: the figures here are too low"
        )
    return [_section("Matrix products of a step, all chips"), *lines]


def _collectives(plan) -> list[str]:
    title = _section(f"What a {_unit(plan)} sends in a step", plan)
    if not plan["collectives"]:
        return [title, f"  nothing: no {_unit(plan)} waits for another"]
    lines = [f"  {'':<20}{'count':>7}{'bytes':>12}   {'overlapped':>12}{'waited for':>12}   over"]
    for kind, entry in plan["collectives"].items():
        hidden, waited = (amount(entry[key]["bytes"], "B") for key in ("overlapped", "sync"))
        sent = f"{entry['count']:>7}{amount(entry['bytes'], 'B'):>12}"
        over = ", ".join(entry["axes"])
        lines.append(f"  {kind:<20}{sent}   {hidden:>12}{waited:>12}   {over}")
    return [title, *lines]


def _is_short(plan) -> bool:
    """Whether a step at best takes so little that the peak rates say nothing about its time: a tiny model."""
    return plan["roofline"] is not None and plan["roofline"]["step_s"] < SHORT_SECONDS


def _speed(plan) -> list[str]:
    roof, run = plan["roofline"], plan["run"]
    hbm = f"{seconds(roof['hbm_s'])}|traffic with the chip's memory"
    rows = [
        f"compute|{seconds(roof['compute_s'])}|matrix products at the chip's printed peak",
        f"HBM|{'?|not known without compiling' if plan['estimate'] else hbm}",
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
    if _is_short(plan):
        rows.append("images/s, expected|?|starting the operations of so short a step takes longer")
    else:
        days = run["days"]
        takes = f"{days:.1f} days" if days >= 1 else progress.duration(days * 86400)
        reached = f"if --efficiency {plan['efficiency']:g} of peak is reached"
        rows.append(f"images/s, expected|{plan['images_per_second']:,.0f}|{reached}")
        images = f"{run['images'] / 1e6:,.1f} M images"
        rows.append(f"the run takes|{takes}|{run['total_steps']:,} steps, {images}")
    if run["per_million"]:
        rows.append("||PER MILLION EXAMPLES of the data set: --examples N gives the run's own")
    return [_section("Time of a step", plan), *_rows(*rows)]


def _input(plan) -> list[str]:
    feed, checkpoint = plan["input"], plan["checkpoint"]
    written = f"{seconds(checkpoint['seconds'])} to write at --storage-rate"
    rows, advice = [f"a checkpoint|{gigabytes(checkpoint['bytes'])}|{written}"], ""
    if feed and not _is_short(plan):
        needs, makes = feed["host_needs_images_per_second"], feed["host_makes_images_per_second"]
        cores = f"{feed['cores_needed']:,.0f} cores at that rate"
        has = (
            f"{feed['cores_per_host']} cores x --input-rate {feed['images_per_second_per_core']:g}"
        )
        a_host = amount(feed["storage_bytes_per_second_per_host"], "B/s")
        in_all = amount(feed["storage_bytes_per_second"], "B/s")
        stored = f"a host, {in_all} in all; --image-bytes {feed['image_bytes']:g}"
        rows = [
            f"a host needs|{needs:,.0f} images/s|{cores}",
            f"a host makes|{makes:,.0f} images/s|{has}",
            f"read from storage|{a_host}|{stored}",
            *rows,
        ]
        if not feed["cores_are_enough"]:
            advice += """
  THE HOSTS' CORES ARE THE LIMIT: store the images at the training size (grain-jax build
  --store-size), which about doubles the rate, or take chips with more hosts"""
        if not feed["storage_is_enough"]:
            advice += """
  STORAGE IS THE LIMIT at this --storage-rate: smaller images (grain-jax build --store-size),
  or storage that is faster for each host"""
        advice += """
  250 images/s a core: tf.data on two cores, JPEGs of 55 kB decoded and resized as PIL does;
  images stored at the training size about twice that. Measure yours."""
    return [_section("Input and storage"), *_rows(*rows), *advice.splitlines()[1:]]


def _bill(plan) -> list[str]:
    bill = plan["bill"]
    whole = "a million examples" if plan["run"]["per_million"] else "the whole run"
    what = f"of {whole}, nothing lost to restarts"
    hours = f"chip-hours|{bill['chip_hours']:,.1f}|{what}"
    if bill["cost"] is None:
        return [_section("The bill"), *_rows(f"{hours}; --price P gives the cost")]
    price = f"at {bill['price_per_chip_hour']:g} a chip-hour"
    return [_section("The bill"), *_rows(hours, f"cost|{bill['cost']:,.2f}|{price}")]


def _search(plan) -> list[str]:
    found = plan["search"]
    form = "  {:<6}{:<10}{:>5}{:>7}{:>12}{:>8}{:>9}{:>11}{}"
    head = "remat attention fsdp gather images/chip batch GB/chip images/s".split()
    lines = [form.format(*head, "")]
    for point in found["tried"]:
        rate, size = point["images_per_second"], f"{point['total_bytes'] / 1e9:.2f}"
        why = "" if point["fits"] else "   does not fit"
        if point["failed"]:
            size, why = "-", "   the compiler failed"
        keys = ("remat", "attention", "fsdp", "gather", "images_per_chip", "batch_size")
        cells = (point[key] for key in keys)
        lines.append(form.format(*cells, size, f"{rate:,.0f}" if rate else "-", why))
    best, largest = found["at_batch"], found["largest"]
    answers = ["  At this batch nothing fits: see microbatches and mesh.fsdp"]
    if best:
        answers = [f"  At this batch: {_flags(best)}"]
    if largest:
        answers.append("  Largest batch that was seen to fit:")
        answers.append(f"    --config.batch_size={largest['batch_size']} {_flags(largest)}")
    return [_section(f"Search, {len(found['tried'])} compiles"), *lines, "", *answers]


def _flags(point) -> str:
    """The levers of a point of the search as flags of the command line."""
    keys = dict(remat="remat", attention="model.attention", fsdp="mesh.fsdp", gather="loss.gather")
    return " ".join(f"--config.{key}={point[name]}" for name, key in keys.items())
