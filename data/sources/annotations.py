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
        for where, item, faults, _ in self.checked(shard):
            wrong = base.Fault(item.image or where, "bad annotation", "; ".join(faults), where)
            yield wrong if faults else item

    def checked(
        self, shard: base.SourceShard
    ) -> Iterator[tuple[str, base.Annotation | base.Fault, list[str], list[str]]]:
        """FILE:LINE, image, faults and unknown keys of each line that is not blank."""
        path, stop = epath.Path(shard.arguments["file"]), shard.arguments["stop"]
        with path.open("rb") as file:
            position = shard.arguments["start"]
            file.seek(position)  # TensorFlow's files return None
            for number, line in enumerate(file, shard.arguments["first_line"]):
                position += len(line)
                if line.strip():
                    where = f"{path.name}:{number}"
                    parsed = annotations.parse_line(line, text_required=False)
                    item = parsed.annotation or base.Annotation(parsed.image)
                    item = item._replace(where=where, drawn_on=self.drawn_on)
                    item = join.load(item, shard.arguments["images"]) if item.image else item
                    yield where, item, parsed.faults, parsed.unknown_keys
                if position >= stop:
                    return
