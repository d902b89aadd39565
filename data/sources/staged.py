"""Sources whose images are files and whose annotations are a few large files, or none: cut into lists.

The annotations are read once, in the process that starts the job; a worker reads a list of some images.
"""

import abc
import itertools
import json
from collections.abc import Iterator
from typing import ClassVar

from etils import epath

from grain_jax.core import atomic
from grain_jax.data.sources import base, join


class ListedSource(abc.ABC):
    """A `base.Source` of images in files and annotations in one file or a few; write `entries`.

    Your class may lie in any module that Python finds: `--source module:Class`. If it is a frozen dataclass,
    its fields are options: `--option KEY=VALUE` sets one, and a ValueError of `__post_init__` is one line.
    `needs` says what --annotations must name; "" for a source that has no such files.
    """

    images_are_files: ClassVar[bool] = True
    needs: ClassVar[str] = ""

    @abc.abstractmethod
    def entries(self, options: base.Options) -> Iterator[base.Annotation | base.Fault]:
        """What the files `options.annotations` say about each image, in an order that depends on them alone.

        An Annotation has the path of its image below --images, captions, and regions: box in pixels (x1, y1,
        x2, y2), description, score. With `drawn_on=base.SHARES` boxes are shares of width and height. `read`
        leaves out boxes and texts that the image cannot have. A Fault stands for an image without use.

        Raises:
          base.SourceError: the files are not as expected; one line.
        """

    def shards(self, options: base.Options) -> list[base.SourceShard]:
        """Writes the lists to `options.scratch`; one shard each, `options.shard_size` images long."""
        if self.needs and not options.annotations:
            raise base.SourceError(f"got no --annotations, expected {self.needs}")
        folder = epath.Path(options.scratch)
        folder.mkdir(parents=True, exist_ok=True)
        shards = []
        rest = iter(self.entries(options))
        while batch := list(itertools.islice(rest, options.shard_size)):
            pairs = ([type(item).__name__, item] for item in batch)  # JSON has no bytes
            lines = "".join(json.dumps(pair, default=bytes.decode) + "\n" for pair in pairs)
            name = base.shard_name(len(shards), lines.encode())
            atomic.write_text(folder / f"{name}.jsonl", lines)
            arguments = {"list": str(folder / f"{name}.jsonl"), "images": str(options.images)}
            shards.append(base.SourceShard(name, arguments))
        return shards

    def read(self, shard: base.SourceShard) -> Iterator[base.Annotation | base.Fault]:
        """The images of one list."""
        with epath.Path(shard.arguments["list"]).open("r") as file:
            for kind, values in map(json.loads, file):
                if kind == "Fault":
                    yield base.Fault(*values)
                else:
                    yield join.load(base.Annotation(*values), shard.arguments["images"])
