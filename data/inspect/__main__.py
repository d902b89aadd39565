"""Inspects a dataset: a summary, problems, JSON and a sheet of images (`grain-jax inspect`)."""

import argparse
import itertools
import json
import sys
import textwrap
from typing import Any

from etils import epath

from grain_jax.core import atomic, errors, printable, progress
from grain_jax.data import example
from grain_jax.data.inspect import arguments, page, problems, reading, statistics

_BATCH = 256  # items that are counted together


def inspect(args: argparse.Namespace) -> str:
    """Reads the set and writes the two files; returns the summary. Raises `errors.UserError`."""
    source = reading.open_set(args.set, args.images)
    output = epath.Path(args.output) if args.output else source.path.parent / "inspect"
    output.mkdir(parents=True, exist_ok=True)  # first: without permission it fails early
    stats, sample = statistics.Statistics(), statistics.ImageSample(args.num_images)
    coming = progress.over(source.items, total=source.total, what="inspecting")
    for batch in iter(lambda: list(itertools.islice(coming, _BATCH)), []):
        for image in stats.add(batch):
            sample.offer(image)
    result = stats.result(source)
    problem_list = problems.find(stats, result)
    result["problems"] = [problem._asdict() for problem in problem_list]
    for name, content in (
        ("inspect.html", page.render(result, problem_list, sample)),
        ("statistics.json", json.dumps(result, indent=1) + "\n"),
    ):
        atomic.write_text(output / name, content)
    return _summary(result, problem_list) + f"\n{output}: inspect.html, statistics.json"


def _summary(result: dict[str, Any], problem_list: list[problems.Problem]) -> str:
    images, texts, regions = result["images"], result["texts"], result["regions"]
    count = max(images["count"], 1)
    sizes = ", ".join(f"{size} ({n / count:.0%})" for size, n in images["sizes"][:3])
    left_out = f" ({images['left_out']:,} left out)" if images["left_out"] else ""
    lines = [
        f"{result['set']['path']}: {result['set']['kind']}",
        f"images        {images['count']:,}{left_out}; {images['bytes'] / 1e6:,.1f} MB; {sizes}",
    ]
    if images["turned"]:
        lines.append(f"turned        {images['turned']:,} images {example.TURNED}")
    for name, of_kind, extent in (
        ("web", texts["web"], f"{texts['web']['images']:,} images have one or more"),
        ("synthetic", texts["synthetic"], f"{texts['synthetic']['images']:,} images"),
        ("descriptions", texts["description"], f"{regions['count'] / count:.2f} per image"),
    ):
        word_counts, tokens, lengths = of_kind["words"], of_kind["tokens"], ""
        if word_counts["count"]:
            least = "at least " if of_kind["copies"]["untracked"] else ""
            lengths = f"; {word_counts['mean']:.1f} words, {tokens['mean']:.1f} tokens"
            lengths += f" (99% up to {tokens['p99']}); {least}{of_kind['copies']['different']:,}"
            lengths += " different"
        lines.append(f"{name:13} {word_counts['count']:,}; {extent}{lengths}")
    negatives = regions["negatives"]
    if negatives.get("max"):
        total = round(negatives["mean"] * negatives["count"])
        lines.append(f"negatives     {total:,}; a region has up to {negatives['max']}")
    lines.append(f"problems      {len(problem_list) or 'none'}")
    digits = max((len(f"{problem.count:,}") for problem in problem_list), default=0)
    for problem in problem_list:
        share = f" ({problem.count / problem.total:.1%})" if problem.total else ""
        line = f"  {problem.count:>{digits},} {problem.what}{share}: {problem.advice}"
        if problem.example:
            shortened = textwrap.shorten(problem.example, 80, placeholder=" ...")
            line += f"; e.g. {printable.plain(shortened)}"
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
