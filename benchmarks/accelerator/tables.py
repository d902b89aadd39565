"""The tables of the measurement of an accelerator."""

from collections.abc import Mapping
from typing import Any

from benchmarks import harness

Rows = list[dict[str, Any]]


def tables(results: Mapping[str, Any]) -> str:
    """The results as text: a table for each kind of row that there is."""
    steps, out = results.get("step", []), []
    if steps:
        heads = f"{'step':26}{'batch':>6}{'images/s':>10}{'ms: median (least - most)':>30}"
        out += ["", f"{heads}{'MFU':>7}{'GB at most':>12}{'by compiler':>12}"]
        out += [*map(_step_line, steps), *ratios(steps)]
    if results.get("parity"):
        out += ["", f"{'attention, against float32':50}{'values':>10}{'gradients':>11}"]
        for row in results["parity"]:
            name = f"{row['shape']}, {row['program']}, {row['dtype']}"
            out.append(f"{name:50}{row['value']:10.1e}{row['gradient']:11.1e}")
    if results.get("operations"):
        found = results["operations"]
        out += ["", f"{'operation of ' + found['of']:34}{'ms a step':>10}{'share':>7}  part"]
        for row in found["rows"]:
            name = f"{row['name'][:33]:34}{row['ms']:10.3f}"
            out.append(f"{name}{row['share']:7.1%}  {row['where'][-60:]}")
    for row in results.get("plan", []):
        out += ["", _plan_line(row, steps)]
    for row in results.get("input", []):
        wait = row["wait_fractions"]
        out += [
            "",
            f"waiting for input: {sum(wait) / len(wait):.1%} of the time, at most {max(wait):.1%} in"
            f" {row['steps_a_line']} steps; {row['what']}, {row['images_per_second']:,.0f} images/s",
        ]
    return "\n".join(out)


def _step_line(row: Mapping[str, Any]) -> str:
    mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
    memory = (row.get("peak_bytes"), row.get("compiled_bytes"))
    memory = "".join(f"{'' if x is None else format(x / 1e9, '.2f'):>12}" for x in memory)
    name, spread = f"{row['size']} {row['side']}", harness.spread(row["seconds"], 1e3, 1)
    return f"{name:26}{row['batch']:6}{row['images_per_second']:10,.1f}{spread:>30}{mfu:>7}{memory}"


def ratios(rows: Rows) -> list[str]:
    """A line for each size that both sides measured: our fastest step in images/s of the PyTorch steps."""
    out = []
    for size in dict.fromkeys(row["size"] for row in rows):
        of = {row["side"]: row["images_per_second"] for row in rows if row["size"] == size}
        best = max((rate for side, rate in of.items() if side.startswith("ours")), default=None)
        theirs = {side: rate for side, rate in of.items() if side.startswith("PyTorch")}
        if best and theirs:
            of_each = ", ".join(f"{best / v:.2f} times those of {n}" for n, v in theirs.items())
            out.append(f"{size}: our fastest step does {of_each}")
    return out


def _plan_line(plan: Mapping[str, Any], steps: Rows) -> str:
    """The plan beside the step of the same size, batch and attention."""
    how = "an estimate" if plan["estimate"] else "compiled"
    line = f"plan of {plan['size']}, {plan['batch']} images on {plan['topology']} ({how}):"
    line += f" {plan['bytes'] / 1e9:.2f} GB, at best {plan['seconds'] * 1e3:.1f} ms"
    same = (plan["size"], f"ours, {plan['attention']}", plan["batch"])
    for row in steps:
        if (row["size"], row["side"], row["batch"]) == same:
            line += f"; measured {row['batch'] / row['images_per_second'] * 1e3:.1f} ms"
            if row.get("peak_bytes"):
                line += f", at most {row['peak_bytes'] / 1e9:.2f} GB"
    return line
