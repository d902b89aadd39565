"""Inspects a dataset: a summary, problems, JSON and a sheet of images (`grain-jax inspect`)."""

import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from etils import epath

from grain_jax.core import atomic, errors, printable, progress
from grain_jax.core.annotations import Annotation, Fault
from grain_jax.data import example, parallel
from grain_jax.data.inspect import page, problems, statistics
from grain_jax.data.inspect.arguments import Inspect
from grain_jax.data.sources import annotations, base, tfds

_BATCH = 256  # items that are counted together
_LINES_PER_TASK = 32  # their images are held in memory


def inspect(args: Inspect) -> str:
    """Reads the set and writes the two files; returns the summary. Raises `errors.UserError`."""
    path, items, total = _open(epath.Path(args.set), args.images)
    output = epath.Path(args.output) if args.output else path.parent / "inspect"
    output.mkdir(parents=True, exist_ok=True)  # first: without permission it fails early
    stats, sample = statistics.Statistics(), []  # images at equal distances
    coming = progress.over(items, total=total, what="inspecting")
    for batch in iter(lambda: list(itertools.islice(coming, _BATCH)), []):
        first = stats.images
        for position, image in enumerate(stats.add(batch), first):
            if len(sample) < args.num_images * (position + 1) / total:
                sample.append(image)
    result = stats.result(str(path), total)
    problem_list = problems.find(stats, result)
    result["problems"] = [problem._asdict() for problem in problem_list]
    for name, content in (
        ("inspect.html", page.render(result, problem_list, sample)),
        ("statistics.json", json.dumps(result, indent=1) + "\n"),
    ):
        atomic.write_text(output / name, content)
    return _summary(result, problem_list) + f"\n{output}: inspect.html, statistics.json"


def _open(
    path: epath.Path, images: str | None
) -> tuple[epath.Path, Iterator[Annotation | Fault], int]:
    """A set's own path, its images and faults, and the number of images that it claims to hold.

    Args:
      path: an `A.jsonl`, or the folder of a record set: OUTPUT/NAME or OUTPUT/NAME/VERSION; its split train is read.
      images: the folder of the images of an A.jsonl; None: the folder of the file.

    Raises:
      errors.UserError: there is no such set, it has no line, or its records have other features.
    """
    if not path.exists():
        raise errors.UserError(
            f"{path}: no such file or folder, expected a record set or an A.jsonl"
        )
    if path.is_dir():
        directory, source = tfds.directory(path), tfds.Tfds()
        shards = source.shards(base.Options(str(directory)))
        items = itertools.chain.from_iterable(map(source.read, shards))
        total = sum(shard.arguments["stop"] - shard.arguments["start"] for shard in shards)
        return directory, items, total
    folder = epath.Path(path.parent if images is None else images)
    if not folder.is_dir():
        raise errors.UserError(f"--images {folder}: no such folder, expected the images of {path}")
    shards = annotations.of_file(path, folder, _LINES_PER_TASK)
    total = sum(shard.arguments["lines"] for shard in shards)
    workers = parallel.default_workers(total)
    read = parallel.ordered_map(_read, shards, workers=workers)
    return path, itertools.chain.from_iterable(read), total


def _read(shard: base.SourceShard) -> list[Annotation | Fault]:
    """The images of the lines, and the faults of the others, named as in data.build."""
    items: list[Annotation | Fault] = []
    for line, where in annotations.lines(shard):
        checked = example.check_line(line, shard.arguments["images"])
        items += [Fault(where, _cause(fault), fault, where) for fault in checked.faults]
        items += [checked.annotation._replace(where=where)] if checked.annotation else []
    return items


def _cause(fault: str) -> str:
    """`regions[3].box: got ...` -> `regions.box`: the part that all faults of a kind share."""
    head, colon, _ = fault.partition(":")
    return re.sub(r"\[\d+\]", "", head) if colon else "not a JSON object"


def _summary(result: dict[str, Any], problem_list: list[problems.Problem]) -> str:
    images, texts, regions = result["images"], result["texts"], result["regions"]
    count = max(images["count"], 1)
    sizes = ", ".join(f"{size} ({n / count:.0%})" for size, n in images["sizes"])
    left_out = f" ({images['left_out']:,} left out)" if images["left_out"] else ""
    lines = [
        result["set"]["path"],
        f"images        {images['count']:,}{left_out}; {images['bytes'] / 1e6:,.1f} MB; {sizes}",
    ]
    if images["turned"]:
        lines.append(f"turned        {images['turned']:,} images {example.TURNED}")
    for kind, of_kind in texts.items():
        tokens, line = of_kind["tokens"], f"; {of_kind['images']:,} images have some"
        if tokens["count"]:
            line += f"; {tokens['mean']:.1f} tokens (99% up to {tokens['p99']})"
        lines.append(f"{kind:13} {tokens['count']:,}{line}")
    lines.append(f"regions       {regions['count']:,}; {regions['count'] / count:.2f} per image")
    lines.append(f"problems      {len(problem_list) or 'none'}")
    for problem in problem_list:
        share = f" ({problem.count / problem.total:.1%})" if problem.total else ""
        line = f"  {problem.count:>7,} {problem.what}{share}: {problem.advice}"
        shortened = textwrap.shorten(problem.example, 80, placeholder=" ...")
        lines.append(f"{line}; e.g. {printable.plain(shortened)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    try:
        print(inspect(Inspect.parse(argv)))
    except (errors.UserError, OSError) as error:
        name = "grain-jax inspect: "
        print(f"{name}{str(error).removeprefix(name)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
