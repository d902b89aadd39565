"""The images of an annotated source with the lines that the job wrote about them: the record set is built from them."""

from collections.abc import Iterator
from typing import ClassVar

from etils import epath

from grain_jax.core import annotations
from grain_jax.data import sources


class AnnotatedSource:
    """A `data.sources.Source` of the images that have a line."""

    images_are_files: ClassVar[bool] = False

    def shards(self, options: sources.Options) -> list[sources.SourceShard]:
        """Raises SourceError: only a job of grain-jax annotate has them (`shards_of`)."""
        raise sources.SourceError("got no job of grain-jax annotate, expected one")

    def read(self, shard: sources.SourceShard) -> Iterator[sources.Image]:
        """The images of the source that have a line. Raises SourceError if the source has others."""
        source = sources.SourceShard(*shard.arguments["shard"])
        file = epath.Path(shard.arguments["output"]) / "annotations" / f"{source.name}.jsonl"
        lines = (
            annotations.parse_line(line, text_required=True).annotation
            for line in file.read_bytes().splitlines()
        )
        line = next(lines, None)
        for item in sources.read(source):
            if line and isinstance(item, sources.Image) and item.image == line.image:
                yield line._replace(encoded=item.encoded)
                line = next(lines, None)
        if line:
            raise sources.SourceError(
                f"source {source.source}: got no image {line.image}, which was there when it was"
                " annotated, expected the same source; give another --output"
            )


def shards_of(output: str, shards: list[sources.SourceShard]) -> list[sources.SourceShard]:
    """The annotated shards of a source, as shards of `AnnotatedSource`; `output` is the folder of the job."""
    name = f"{__name__}:AnnotatedSource"
    return [
        sources.SourceShard(shard.name, {"output": output, "shard": list(shard)}, name)
        for shard in shards
    ]
