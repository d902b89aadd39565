"""Inspects a dataset: a summary, problems, JSON and a sheet of images (`grain-jax inspect`)."""

import functools
import itertools
import json
import sys
import textwrap
from typing import Any

from etils import epath

from grain_jax.cli import process
from grain_jax.core import ahead, atomic, errors, printable, progress
from grain_jax.core.annotations import Annotation, Fault
from grain_jax.data import example, sources
from grain_jax.data.inspect import audit, page, statistics
from grain_jax.data.inspect.arguments import Inspect
from grain_jax.data.sources import join
from grain_jax.input_pipeline import record_folders

_BATCH = 256  # items that are counted together
_LINES_PER_TASK = 32  # their images are held in memory


def inspect(args: Inspect) -> str:
    """Reads the set and writes the files; returns the summary. Raises `errors.UserError`."""
    predictor = audit.load(args.checkpoint) if args.checkpoint else None  # early: it may be missing
    path = epath.Path(args.set)
    shown = path.parent if path.name == record_folders.VERSION else path
    output = epath.Path(args.output or shown.parent / f"inspect-{shown.stem}")
    kind, folder, files, size = "tfds", str(path), (), 1000
    if not path.is_dir():
        folder, files = args.images or str(path.parent), (str(path),)
        kind, size = "annotations", _LINES_PER_TASK
    shards = sources.shards(kind, sources.Options(folder, files, shard_size=size))
    output.mkdir(parents=True, exist_ok=True)  # early, in case that it may not be written
    total = sum(x.arguments["lines"] if files else x.arguments["stop"] - x.arguments["start"] for x in shards)
    workers = ahead.default_processes(total) if files else 0
    read = ahead.in_processes(_read, shards, workers)
    coming = progress.over(itertools.chain.from_iterable(read), total=total, what="inspecting")
    stats, sample = statistics.Statistics(), []  # images at equal distances
    for batch in iter(lambda: list(itertools.islice(coming, _BATCH)), []):
        first = stats.images
        for position, image in enumerate(stats.add(batch), first):
            if len(sample) < args.num_images * (position + 1) / total:
                sample.append(image)
    result = stats.result(str(path), total)
    if not stats.images:
        first = result["problems"][0]["example"]
        raise errors.UserError(f"{path}: none of {total} images could be read; {first}")
    worst, names = [], "inspect.html, statistics.json"
    if predictor:
        if not stats.regions:
            raise errors.UserError(f"{path}: got no regions, expected some for --checkpoint to rank")
        coming = itertools.chain.from_iterable(map(sources.read, shards))
        coming = progress.over(coming, total=total, what="asking the model")
        texts = [text for text, _ in stats.texts["description"].most_common(audit.MOST_TEXTS)]
        lines, worst = audit.rank(predictor, coming, texts)
        atomic.write_text(output / "audit.tsv", "\n".join(lines) + "\n")
        names += ", audit.tsv"
    atomic.write_text(output / "inspect.html", page.render(result, sample, worst))
    atomic.write_text(output / "statistics.json", json.dumps(result, indent=1) + "\n")
    return _summary(result) + f"\n{output}: {names}"


def _read(shard: sources.SourceShard) -> list[Annotation | Fault]:
    """The images of a shard that can be decoded, and the faults of the others."""
    items = list(sources.read(shard))
    if shard.source != "annotations":
        return items
    decoded = map(join.decode, items)
    return [image if isinstance(image, Fault) else item for image, item in zip(decoded, items)]


def _summary(result: dict[str, Any]) -> str:
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
    for kind, x in texts.items():
        tokens = f"; {x['mean_tokens']:.1f} tokens (99% up to {x['p99_tokens']})" if x["count"] else ""
        lines.append(f"{kind:13} {x['count']:,}{tokens}")
    lines.append(f"regions       {regions['count']:,}; {regions['count'] / count:.2f} per image")
    lines.append(f"problems      {len(result['problems']) or 'none'}")
    for problem in result["problems"]:
        first = printable.plain(textwrap.shorten(problem["example"], 80, placeholder=" ..."))
        line = f"  {problem['count']:>7,} {problem['what']}: {problem['advice']}; e.g. {first}"
        lines.append(line)
    return "\n".join(lines)


main = functools.partial(process.console, Inspect, inspect)


if __name__ == "__main__":
    sys.exit(main(None))
