"""Formats a plan (`grain-jax plan`) as text."""

import textwrap
from typing import Any

from grain_jax import progress

WIDTH = 96
SHORT_SECONDS = 1e-3  # a step has hundreds of operations, each of which takes microseconds to start
# (config key, values and effect) to try when memory runs out; the first cost the least time.
REMEDIES = (
    ("remat", "qkv or full: computes activations again in the backward pass"),
    ("microbatches", "2, 4, ...: fewer images at a time, the same loss"),
    ("mesh.fsdp", "2, 4, ...: cuts parameters and moments over chips"),
    ("optim.moment_dtype", "bfloat16: halves the first moment"),
    ("loss.tile", "512: smaller tiles of similarities"),
)


def amount(number: float, unit: str = "") -> str:
    """A number with three digits and an SI prefix: 1.52 G, 703 M."""
    for factor, prefix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(number) >= factor:
            value = number / factor
            digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
            return f"{value:.{digits}f} {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def gigabytes(size: float) -> str:
    """Bytes as GB with two decimals."""
    return f"{size / 1e9:.2f} GB"


def seconds(time: float) -> str:
    """A time below one second in ms, a longer one in hours, minutes and seconds."""
    return f"{time * 1e3:.3g} ms" if time < 1 else progress.duration(time)


def page(plan: dict[str, Any]) -> str:
    """The text of a plan that `plan.make` returned."""
    parts = [
        _heading(plan),
        _memory(plan),
        _out_of_memory(plan),
        _work(plan),
        _collectives(plan),
        _speed(plan),
        _input(plan),
        _bill(plan),
        _search(plan),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _section(title: str) -> str:
    return f"-- {title} ".ljust(WIDTH, "-")


def _rows(rows: list[tuple[str, str, str]]) -> list[str]:
    """Formats rows of (label, number, note); the numbers are right-aligned."""
    wide = max(len(row[1]) for row in rows)
    return [f"  {label:<26}{value:>{wide}}  {note}".rstrip() for label, value, note in rows]


def _heading(plan) -> list[str]:
    memory = plan["memory"]
    spare = memory["limit_bytes"] - memory["total_bytes"]
    verdict = (
        f"FITS: {gigabytes(memory['total_bytes'])} of {gigabytes(memory['limit_bytes'])} a chip,"
        f" {gigabytes(spare)} free"
        if plan["fits"]
        else f"DOES NOT FIT: {gigabytes(memory['total_bytes'])} a chip, {gigabytes(-spare)} more than the"
        f" {gigabytes(memory['limit_bytes'])} there are"
    )
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    shards = plan["mesh"]["data"] * plan["mesh"]["fsdp"]
    lines = [
        f"{plan['topology']}: {plan['chips']} chips on {plan['hosts']} host(s)"
        + (f" in {plan['slices']} slices or nodes" if plan["slices"] > 1 else ""),
        f"mesh {mesh}; {plan['batch_size']} images a step, {plan['batch_size'] // shards} a chip",
        *textwrap.wrap(" ".join(f"{k}={v}" for k, v in plan["levers"].items()), WIDTH),
    ]
    if plan["estimate"]:
        lines.append("ESTIMATE by arithmetic: nothing was compiled; within a fifth of what was")
        lines += textwrap.wrap(plan["not_compiled"], WIDTH)
    else:
        by = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
        lines += textwrap.wrap(f"compiled for {plan['chip'].upper()} without one; {by}", WIDTH)
        for what in plan["not_known"]:
            lines += textwrap.wrap(f"not known: {what}", WIDTH)
    if plan["derived"]:
        lines += textwrap.wrap("derived: " + plan["derived"], WIDTH)
    if plan["overrides"]:
        lines += textwrap.wrap("given: " + " ".join(plan["overrides"]), WIDTH)
    lines += ["", verdict]
    if (
        not plan["fits"]
        and memory.get("peak_bytes", memory["total_bytes"]) <= memory["limit_bytes"]
    ):
        lines.append(
            f"(the compiler accepts it, with a peak of {gigabytes(memory['peak_bytes'])}; the sum is the safe"
            " side: try it on one host)"
        )
    return lines


def _memory(plan) -> list[str]:
    memory, label = plan["memory"], " (ESTIMATE)" if plan["estimate"] else ""
    names = {
        "parameters": "float32",
        "moments": "Adam's two",
        "ema": "average of the parameters",
        "batch": "images, texts, boxes",
        "padding": "to the chip's tiles",
    }
    rows = [
        (f"  {kind}", gigabytes(size), names[kind])
        for kind, size in memory["arguments"].items()
        if size or kind in ("parameters", "moments")
    ]
    rows = [("arguments", gigabytes(memory["arguments_bytes"]), "held from step to step"), *rows]
    rows.append(("temporaries", gigabytes(memory["temporaries_bytes"]), "gradients, activations"))
    notes = {
        "gradients": "float32",
        "activations": "kept for the backward pass",
        "layer": "one layer at work",
        "losses": "tiles of similarities, columns on the ring",
    }
    for kind, size in memory.get("temporaries", {}).items():
        rows.append((f"  {kind}", gigabytes(size), notes[kind]))
    output = memory["output_bytes"] - memory["aliased_bytes"]
    if memory["output_bytes"]:
        note = f"{gigabytes(memory['aliased_bytes'])} more is written over the arguments"
        rows.append(("output", gigabytes(output), note))
    if memory["code_bytes"]:
        rows.append(("program", gigabytes(memory["code_bytes"]), "its instructions"))
    note = ""
    if "peak_bytes" in memory:
        note = f"the compiler's own peak is {gigabytes(memory['peak_bytes'])}: it reuses some of it"
    rows.append(("total", gigabytes(memory["total_bytes"]), note))
    rows.append(("limit", gigabytes(memory["limit_bytes"]), "of a chip, what a program may use"))
    return [_section(f"Memory of one chip{label}"), *_rows(rows)]


def _out_of_memory(plan) -> list[str]:
    if plan["fits"] or "largest" not in plan:
        return []
    rows = []
    for entry in plan["largest"]:
        times = f"{entry['count']} x " if entry["count"] > 1 else ""
        where = entry["where"]
        if len(where) > 44:
            where = "..." + where[-41:]
        rows.append((f"{times}{entry['shape']}", gigabytes(entry["count"] * entry["bytes"]), where))
    wide = max(len(row[0]) for row in rows)
    lines = [f"  {shape:<{wide}}  {size:>8}  {where}" for shape, size, where in rows]
    levers = plan["levers"]
    change = [f"  --config.{key:<20} (is {levers[key]}) {what}" for key, what in REMEDIES]
    return [_section("The largest arrays, and what to change"), *lines, "", *change]


def _work(plan) -> list[str]:
    if plan["flops"] is None:
        return []
    model, done, traced = plan["model_flops"], plan["flops"], plan["traced_flops"]
    rows = [("model", amount(model, "FLOP"), "forward and backward, nothing computed twice")]
    if traced is not None:
        note = f"{traced / model - 1:+.1%}: recomputed (remat={plan['levers']['remat']}"
        parts = plan["levers"]["microbatches"]
        note += f", {parts} micro-batches)" if parts > 1 else ")"
        rows.append(("as written", amount(traced, "FLOP"), note))
        note = f"{done / traced - 1:+.1%} by the compiler; {model / done:.0%} of the work is the model's"
    else:
        note = f"{model / done:.0%} of the work is the model's (ESTIMATE)"
    rows.append(("compiled", amount(done, "FLOP"), note))
    lines = _rows(rows)
    if plan.get("unknown_loops"):
        lines.append(
            f"  {plan['unknown_loops']} loop(s) of unknown length were counted once: the figures here are too low"
        )
    return [_section("Matrix products of a step, all chips"), *lines]


def _collectives(plan) -> list[str]:
    if plan["flops"] is None:
        return []
    label = " (ESTIMATE)" if plan["estimate"] else ""
    title = _section(f"What a chip sends in a step{label}")
    if not plan["collectives"]:
        return [title, "  nothing: no chip waits for another"]
    lines = [f"  {'':<20}{'count':>7}{'bytes':>12}   {'overlapped':>12}{'waited for':>12}   over"]
    for kind, entry in plan["collectives"].items():
        lines.append(
            f"  {kind:<20}{entry['count']:>7}{amount(entry['bytes'], 'B'):>12}"
            f"   {amount(entry['overlapped']['bytes'], 'B'):>12}"
            f"{amount(entry['sync']['bytes'], 'B'):>12}   {', '.join(entry['axes'])}"
        )
    return [title, *lines]


def _is_short(plan) -> bool:
    """Whether a step at best takes so little that the peak rates say nothing about its time: a tiny model."""
    return plan["roofline"] is not None and plan["roofline"]["step_s"] < SHORT_SECONDS


def _speed(plan) -> list[str]:
    roof = plan["roofline"]
    if roof is None:
        return []
    rows = [
        ("compute", seconds(roof["compute_s"]), "matrix products at the chip's printed peak"),
        ("HBM", seconds(roof["hbm_s"]), "traffic with the chip's memory"),
        ("interconnect", seconds(roof["interconnect_s"]), "between the chips of a slice or node"),
    ]
    if plan["slices"] > 1:
        rows.append(("network", seconds(roof["dcn_s"]), "between slices or nodes"))
    rows.append(
        ("waiting", seconds(roof["exposed_s"]), "of these transfers, not hidden behind work")
    )
    rows.append(("step, at best", seconds(roof["step_s"]), f"bound by {roof['bound']}"))
    if plan["estimate"]:
        rows[1] = ("HBM", "?", "not known without compiling")
    run, fast, rate = plan["run"], plan["images_per_second_at_most"], plan["images_per_second"]
    days = _days(run["days"])
    what = f"{run['total_steps']:,} steps, {run['images'] / 1e6:,.1f} M images"
    rows += [
        ("images/s, at most", f"{fast:,.0f}", "no run can beat it"),
        (
            "images/s, expected",
            f"{rate:,.0f}",
            f"if --efficiency {plan['efficiency']:g} of peak is reached",
        ),
        ("the run takes", days, what),
    ]
    if _is_short(plan):
        rows[-2:] = [
            ("images/s, expected", "?", "starting the operations of so short a step takes longer")
        ]
    if run["per_million"]:
        rows.append(
            ("", "", "PER MILLION EXAMPLES of the data set: --examples N gives the run's own")
        )
    label = " (ESTIMATE)" if plan["estimate"] else ""
    return [_section(f"Time of a step{label}"), *_rows(rows)]


def _days(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else progress.duration(days * 86400)


def _input(plan) -> list[str]:
    feed, checkpoint = plan["input"], plan["checkpoint"]
    if _is_short(plan):
        feed = None
    rows = []
    if feed:
        cores, per_core = feed["cores_per_host"], feed["images_per_second_per_core"]
        needs, makes = feed["host_needs_images_per_second"], feed["host_makes_images_per_second"]
        rows = [
            (
                "a host needs",
                f"{needs:,.0f} images/s",
                f"{feed['cores_needed']:,.0f} cores at that rate",
            ),
            (
                "a host makes",
                f"{makes:,.0f} images/s",
                f"{cores} cores x --input-rate {per_core:g}",
            ),
            (
                "read from storage",
                f"{amount(feed['storage_bytes_per_second_per_host'], 'B/s')}",
                f"a host, {amount(feed['storage_bytes_per_second'], 'B/s')} in all;"
                f" --image-bytes {feed['image_bytes']:g}",
            ),
        ]
    rows.append(
        (
            "a checkpoint",
            gigabytes(checkpoint["bytes"]),
            f"{seconds(checkpoint['seconds'])} to write at --storage-rate",
        )
    )
    lines = [_section("Input and storage"), *_rows(rows)]
    if feed and not feed["cores_are_enough"]:
        lines.append(
            "  THE HOSTS' CORES ARE THE LIMIT: store the images at the training size (grain-jax build"
        )
        lines.append("  --store-size), which about doubles the rate, or take chips with more hosts")
    if feed and not feed["storage_is_enough"]:
        lines.append(
            "  STORAGE IS THE LIMIT at this --storage-rate: smaller images (grain-jax build --store-size),"
        )
        lines.append("  or storage that is faster for each host")
    if feed:
        lines.append(
            "  250 images/s a core: tf.data on two cores, JPEGs of 55 kB decoded and resized as PIL does;"
        )
        lines.append("  images stored at the training size about twice that. Measure yours.")
    return lines


def _bill(plan) -> list[str]:
    bill = plan["bill"]
    if bill is None or _is_short(plan):
        return []
    whole = "a million examples" if plan["run"]["per_million"] else "the whole run"
    rows = [("chip-hours", f"{bill['chip_hours']:,.1f}", f"of {whole}, nothing lost to restarts")]
    if bill["cost"] is not None:
        rows.append(
            ("cost", f"{bill['cost']:,.2f}", f"at {bill['price_per_chip_hour']:g} a chip-hour")
        )
    else:
        rows[0] = (*rows[0][:2], rows[0][2] + "; --price P gives the cost")
    return [_section("The bill"), *_rows(rows)]


def _search(plan) -> list[str]:
    found = plan.get("search")
    if not found:
        return []
    lines = [
        f"  {'remat':<6}{'attention':<10}{'fsdp':>5}{'gather':>7}{'images/chip':>12}{'batch':>8}"
        f"{'GB/chip':>9}{'images/s':>11}"
    ]
    for point in found["tried"]:
        rate, size = point["images_per_second"], f"{point['total_bytes'] / 1e9:.2f}"
        why = "" if point["fits"] else "   does not fit"
        if point["failed"]:
            size, why = "-", "   the compiler failed"
        lines.append(
            f"  {point['remat']:<6}{point['attention']:<10}{point['fsdp']:>5}{point['gather']:>7}"
            f"{point['images_per_chip']:>12}{point['batch_size']:>8}{size:>9}"
            f"{f'{rate:,.0f}' if rate else '-':>11}{why}"
        )
    answers = []
    if found["at_batch"]:
        best = found["at_batch"]
        answers.append(f"  At this batch: {_flags(best)}")
    else:
        answers.append("  At this batch nothing fits: see microbatches and mesh.fsdp")
    if found["largest"]:
        best = found["largest"]
        answers.append("  Largest batch that was seen to fit:")
        answers.append(f"    --config.batch_size={best['batch_size']} {_flags(best)}")
    return [_section(f"Search, {len(found['tried'])} compiles"), *lines, "", *answers]


def _flags(point) -> str:
    """The levers of a point of the search as flags of the command line."""
    return (
        f"--config.remat={point['remat']} --config.model.attention={point['attention']}"
        f" --config.mesh.fsdp={point['fsdp']} --config.loss.gather={point['gather']}"
    )
