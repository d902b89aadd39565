"""Sources whose images are files and whose annotations are one large file, or none: cut into lists.

The annotations are read once, where the pipeline starts; workers read a list of some images each.
So a worker needs neither COCO's 500 MB nor time to find its part of them.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator

from etils import epath

from data.sources import base
from grain_jax.files import atomic


def stage(
    source: str, items: Iterable[base.Entry | base.Fault], options: base.Options
) -> list[base.Shard]:
    """Writes the lists to `options.scratch`; one shard each, `options.shard_size` images long."""
    if not options.scratch:
        raise base.SourceError(
            f"source {source}: got no scratch folder, expected one for its lists"
        )
    folder = epath.Path(options.scratch)
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    rest = iter(items)
    batches = iter(lambda: list(itertools.islice(rest, options.shard_size)), [])
    for number, batch in enumerate(batches):
        lines = "".join(json.dumps([type(item).__name__, item]) + "\n" for item in batch)
        # Another content gets another name, so that it is not taken for one that is finished.
        digest = hashlib.sha256(lines.encode()).hexdigest()[:8]
        name = f"{number:06d}-{digest}"
        path = folder / f"{name}.jsonl"
        atomic.write_text(path, lines)
        arguments = {"list": str(path), "images": str(options.images)}
        shards.append(base.Shard(name, source, arguments))
    return shards


def read(shard: base.Shard) -> Iterator[base.Picture | base.Fault]:
    """The images of one list."""
    with epath.Path(shard.arguments["list"]).open("r") as file:
        for line in file:
            kind, values = json.loads(line)
            if kind == "Fault":
                yield base.Fault(*values)
                continue
            entry = base.Entry(*values)
            size = tuple(entry.size) if entry.size else None
            yield base.load(entry._replace(size=size), shard.arguments["images"])
