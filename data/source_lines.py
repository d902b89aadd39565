"""The images of a data source as lines of A.jsonl, for `grain-jax build --source` and for `grain-jax annotate`."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from grain_jax.core import annotations
from grain_jax.data import example, sources


def region(found: annotations.Region) -> dict[str, Any]:
    """The object of a region in a line."""
    out = {"box": found.box_xyxy, "description": found.description, "score": found.score}
    return out | ({"negatives": found.negatives} if found.negatives else {})


def line(item: sources.Image) -> dict[str, Any]:
    """The object of an image's line."""
    out: dict[str, Any] = {"image": item.image}
    if len(item.captions) == 1:
        out["caption"] = item.captions[0]
    elif item.captions:
        out["captions"] = list(item.captions)
    if item.synthetic_caption:
        out["synthetic_caption"] = item.synthetic_caption
    out["regions"] = list(map(region, item.regions))
    if item.phrases is not None:
        out["phrases"] = list(map(list, item.phrases))
    if item.id is not None:
        out["id"] = item.id
    return out


def lines(shards: Sequence[sources.SourceShard]) -> Iterator[example.Line]:
    """A line for each image of the shards, with the faults of the source, numbered from 1 through all of them."""
    items = ((shard.source, item) for shard in shards for item in sources.read(shard))
    for number, (source, item) in enumerate(items, 1):
        where = item.where or f"source {source}, image {number}"
        if isinstance(item, sources.Fault):
            yield example.Line(number, b"", faults=(_in_words(item),), where=where)
        else:
            text = json.dumps(line(item)).encode()
            left_out = tuple(map(_in_words, item.left_out))
            yield example.Line(number, text, item.encoded, left_out=left_out, where=where)


def _in_words(fault: sources.Fault) -> str:
    image = "" if fault.image == fault.where else f"{fault.image}: "
    return f"{image}{fault.cause}: {fault.detail}"
