"""Inspects a data set: statistics, problems and a contact sheet, as HTML, PNG and JSON (`grain-jax inspect`)."""

import argparse
import itertools
import json
import sys
import textwrap

from etils import epath

from grain_jax.core import atomic, errors, progress
from grain_jax.data import example
from grain_jax.data.inspect import (
    arguments,
    counting,
    page,
    panels,
    problems,
    reading,
    sheet,
    statistics,
)

_BATCH = 256  # items that are counted together


def inspect(args: argparse.Namespace) -> str:
    """Reads the set and writes the three files; returns the summary. Raises `errors.UserError`."""
    source = reading.open_set(args.set, args.images, args.orientation)
    output = epath.Path(args.output) if args.output else source.path.parent / "inspect"
    output.mkdir(parents=True, exist_ok=True)  # first: without permission it fails early
    stats, sample = statistics.Statistics(), counting.Sample(args.num_images)
    coming = progress.over(source.items, total=source.total, what="inspecting")
    for batch in iter(lambda: list(itertools.islice(coming, _BATCH)), []):
        items = [item for item in batch if isinstance(item, reading.Item)]
        for fault in (item for item in batch if isinstance(item, reading.Fault)):
            stats.add_fault(fault)
        stats.add(items)
        for item in items:
            sample.add(item.name, item)
    result = stats.result(source, args.lanes)
    found = problems.find(stats, result)
    made = [panels.make(item) for item in sample.things()]
    shown = [panel for panel in made if panel is not None]
    result["contact_sheet"] = {"shown": len(shown), "damaged": len(made) - len(shown)}
    result["problems"] = [problem._asdict() for problem in found]
    written = {"inspect.html": page.render(result, found, shown).encode()}
    written["statistics.json"] = (json.dumps(result, indent=1) + "\n").encode()
    if shown:
        title = (
            f"{source.path}: {len(shown)} of {stats.images:,} images. Boxes are numbered by score,"
        )
        title += " which stands behind each description."
        written["contact_sheet.png"] = sheet.draw(shown, title)
    for name, content in written.items():
        atomic.write_bytes(output / name, content)
    return _summary(result, found) + f"\n{output}: " + ", ".join(written)


def _summary(result: dict, found: list[problems.Problem]) -> str:
    images, captions, regions = result["pictures"], result["captions"], result["regions"]
    count = max(images["count"], 1)
    sizes = ", ".join(f"{size} ({n / count:.0%})" for size, n in images["sizes"][:3])
    shards = result["set"]["shards"]["count"]
    kind = result["set"]["kind"] + (f", {shards} shards" if shards else "")
    left_out = f" ({images['left_out']:,} left out)" if images["left_out"] else ""
    lines = [
        f"{result['set']['path']}: {kind}",
        f"images        {images['count']:,}{left_out}; {images['bytes'] / 1e6:,.1f} MB; {sizes}",
    ]
    if images["turned"]:
        what = example.TURNED[images["orientation"]]
        lines.append(f"turned        {images['turned']:,} images {what}")
    for line in statistics.shape_lines(images["shapes"]):
        lines.append(f"shapes        {line}")
    web, synthetic = (captions[f"pictures_with_{kind}"] for kind in ("web", "synthetic"))
    an_image = f"{regions['count'] / count:.2f} regions an image"
    for name, texts, some in (
        ("web", captions["web"], f"{web:,} images have one or more"),
        ("synthetic", captions["synthetic"], f"{synthetic:,} images"),
        ("descriptions", result["descriptions"], an_image),
    ):
        words, tokens, lengths = texts["words"], texts["tokens"], ""
        if words["count"]:
            different = f"{texts['distinct']['distinct']:,} different"
            lengths = f"; {words['mean']:.1f} words, {tokens['mean']:.1f} tokens"
            lengths += f" (99% up to {tokens['p99']}); {different}"
        lines.append(f"{name:13} {words['count']:,}; {some}{lengths}")
    if regions["with_negatives"]:
        per_region = regions["negatives_per_region"]
        total = round(per_region["mean"] * per_region["count"])
        some = f"{regions['with_negatives']:,} regions have some, up to {per_region['max']} each"
        lines.append(f"negatives     {total:,}; {some}")
    if captions["pictures_with_none"]:
        lines.append(f"no caption    {captions['pictures_with_none']:,} images")
    groups = result["padding"]["groups"]
    if groups:
        shares = ", ".join(f"{g['group']}: {g['rows']} rows {g['padding']:.0%}" for g in groups)
        lines.append(f"padding       by pack_group: {shares}")
    lines.append(f"problems      {len(found) or 'none'}")
    digits = max((len(f"{problem.count:,}") for problem in found), default=0)
    for problem in found:
        share = f" ({problem.count / problem.of:.1%})" if problem.of else ""
        line = f"  {problem.count:>{digits},} {problem.what}{share}: {problem.advice}"
        if problem.example:
            line += f"; e.g. {textwrap.shorten(problem.example, 80, placeholder=' ...')}"
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    try:
        print(inspect(arguments.Inspect.parse(argv)))
    except (errors.UserError, PermissionError, NotADirectoryError, FileExistsError) as error:
        name = "grain-jax inspect: "
        print(f"{name}{str(error).removeprefix(name)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
