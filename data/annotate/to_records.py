"""Hands the annotations of a job to grain-jax build, with images that come out of tars or TFDS sets."""

import argparse
import json
from collections.abc import Iterator, Sequence

from etils import epath
from grain_jax.data import example, sources, survey
from grain_jax.data.annotate import outputs
from grain_jax.data.arguments import build_parser


def arguments_of_build(args: argparse.Namespace, source: sources.Source) -> argparse.Namespace:
    """The arguments of grain-jax build; wrong ones end the command before any work."""
    given = {
        "--annotations": str(epath.Path(args.output) / "A.jsonl"),
        "--images": args.images if source.images_are_files else args.output,
        "--output": str(epath.Path(args.output) / "records"),
        "--name": args.records,
        "--orientation": args.orientation,
        "--store-size": args.store_size,
        "--encoding": args.encoding,
        "--num-shards": args.num_shards,
        "--max-faults": args.max_faults,
    }
    pairs = [f"{name}={value}" for name, value in given.items() if value is not None]
    return build_parser().parse_args([*pairs, "--overwrite"])


def line_reader(
    source: sources.Source, output: outputs.Output, shards: Sequence[sources.Shard]
) -> survey.ReadLines:
    """How grain-jax build reads the lines of A.jsonl: with their images, where these are no files.

    It raises SourceError where the source no longer has the images that were annotated.
    """
    if source.images_are_files:
        return example.read_lines
    return lambda annotations: _lines_with_images(output, shards)


def _lines_with_images(
    output: outputs.Output, shards: Sequence[sources.Shard]
) -> Iterator[example.Line]:
    number = 0
    for shard in shards:
        lines = iter(output.read("annotations", shard.name))
        line = next(lines, None)
        for item in sources.read(shard):
            if line and isinstance(item, sources.Image) and item.image == line["image"]:
                number += 1
                yield example.Line(number, json.dumps(line).encode(), item.encoded)
                line = next(lines, None)
        if line:
            raise sources.SourceError(
                f"source {shard.source}: got no image {line['image']}, which was there when it was"
                " annotated, expected the same source; give another --output"
            )
