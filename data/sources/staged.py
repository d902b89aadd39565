"""Sources whose images are files and whose annotations are a few large files, or none: cut into lists.

The annotations are read once, where the pipeline starts; a worker reads a list of some images. So a worker needs
neither COCO's 500 MB nor the time to find its part of them.
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
    """A `base.Source` whose subclass gives `entries`: `shards` writes them to lists, `read` joins them with their images.

    Attributes:
      needs: what --annotations must name; "" for a source that has no such files.
    """

    images_are_files: ClassVar[bool] = True
    needs: ClassVar[str] = ""

    @abc.abstractmethod
    def entries(self, options: base.Options) -> Iterator[base.Entry | base.Fault]:
        """What the annotations say of each image, in an order that depends on the files alone.

        Boxes and descriptions need no check here: `read` leaves out those that the image cannot have.

        Raises:
          base.SourceError: the files are not as expected. A fault of one image is yielded instead.
        """

    def shards(self, options: base.Options) -> list[base.SourceShard]:
        """Writes the lists to `options.scratch`; one shard each, `options.shard_size` images long."""
        if not options.scratch:
            raise base.SourceError("got no scratch folder, expected one for the lists of images")
        if self.needs and not options.annotations:
            raise base.SourceError(f"got no --annotations, expected {self.needs}")
        folder = epath.Path(options.scratch)
        folder.mkdir(parents=True, exist_ok=True)
        shards = []
        rest = iter(self.entries(options))
        while batch := list(itertools.islice(rest, options.shard_size)):
            lines = "".join(json.dumps([type(item).__name__, item]) + "\n" for item in batch)
            name = base.shard_name(len(shards), lines.encode())
            path = folder / f"{name}.jsonl"
            atomic.write_text(path, lines)
            arguments = {"list": str(path), "images": str(options.images)}
            shards.append(base.SourceShard(name, arguments))
        return shards

    def read(self, shard: base.SourceShard) -> Iterator[base.Image | base.Fault]:
        """The images of one list."""
        with epath.Path(shard.arguments["list"]).open("r") as file:
            for kind, values in map(json.loads, file):
                if kind == "Fault":
                    yield base.Fault(*values)
                    continue
                entry = base.Entry(*values)
                found = join.load(entry, shard.arguments["images"])
                yield found._replace(where=entry.where)
