"""The project's own A.jsonl with its folder of images; a shard is a part of the file, by bytes."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import ClassVar

from etils import epath

from grain_jax.core import annotations, regular_file
from grain_jax.data.sources import base, join


@dataclasses.dataclass(frozen=True)
class AnnotationLines(base.BoxUnit):
    """A `base.Source` of annotation lines."""

    images_are_files: ClassVar[bool] = True

    def shards(self, options: base.Options) -> list[base.SourceShard]:
        """Parts of `options.shard_size` lines of each file."""
        if not options.annotations:
            raise base.SourceError("got no --annotations, expected A.jsonl")
        out = []
        for path in map(epath.Path, options.annotations):
            first, start = 1, 0
            rest = regular_file.lines(path, annotations.EXPECTED)
            while lines := list(itertools.islice(rest, options.shard_size)):
                stop = start + sum(map(len, lines))
                arguments = {
                    "file": str(path),
                    "images": str(options.images),
                    "first_line": first,
                    "start": start,
                    "stop": stop,
                    "lines": sum(1 for line in lines if line.strip()),
                }
                out.append(base.SourceShard(base.shard_name(len(out), b"".join(lines)), arguments))
                first, start = first + len(lines), stop
        return out

    def read(self, shard: base.SourceShard) -> Iterator[base.Annotation | base.Fault]:
        """The part's images; a line with a fault is left out whole, as grain-jax build does."""
        for line, where in lines(shard):
            parsed = annotations.parse_line(line, text_required=False)
            if parsed.annotation is None:
                detail = "; ".join(parsed.faults)
                yield base.Fault(parsed.image or where, "bad annotation", detail, where)
            else:
                annotation = parsed.annotation._replace(where=where, drawn_on=self.drawn_on)
                yield join.load(annotation, shard.arguments["images"])


def lines(shard: base.SourceShard) -> Iterator[tuple[bytes, str]]:
    """The lines of a part that are not blank, and where each stands, FILE:LINE."""
    path, stop = epath.Path(shard.arguments["file"]), shard.arguments["stop"]
    with path.open("rb") as file:
        position = shard.arguments["start"]
        file.seek(position)  # TensorFlow's files return None
        for number, line in enumerate(file, shard.arguments["first_line"]):
            position += len(line)
            if line.strip():
                yield line, f"{path.name}:{number}"
            if position >= stop:
                return
