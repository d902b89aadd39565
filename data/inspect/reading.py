"""Reads a record set or an A.jsonl as a stream of images and faults, as data sources give them."""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from grain_jax.core import errors
from grain_jax.data import example, parallel
from grain_jax.data.sources import annotations, base, tfds

Item = base.Annotation | base.Fault
_LINES_PER_TASK = 32  # their images are held in memory


class ImageSet(NamedTuple):
    """A set, not read yet."""

    path: epath.Path
    kind: str  # "TFDS records" or "annotations"
    items: Iterator[Item]
    total: int  # images that the set claims to hold


def open_set(path: epath.PathLike, images: epath.PathLike | None) -> ImageSet:
    """The set at `path`.

    Args:
      path: an `A.jsonl`, or the folder of a record set: OUTPUT/NAME or OUTPUT/NAME/VERSION; its split train is read.
      images: the folder of the images of an A.jsonl; None: the folder of the file.

    Raises:
      errors.UserError: there is no such set, it has no line, or its records have other features.
    """
    path = epath.Path(path)
    if not path.exists():
        raise errors.UserError(
            f"{path}: no such file or folder, expected a record set or an A.jsonl"
        )
    if path.is_dir():
        if images is not None:
            raise errors.UserError(
                f"--images {images}: {path} is a folder of records, which hold their images;"
                " expected an A.jsonl with --images"
            )
        directory, source = tfds.directory(path), tfds.Tfds()
        shards = source.shards(base.Options(str(directory)))
        items = itertools.chain.from_iterable(map(source.read, shards))
        total = sum(shard.arguments["stop"] - shard.arguments["start"] for shard in shards)
        return ImageSet(directory, "TFDS records", items, total)
    folder = epath.Path(path.parent if images is None else images)
    if not folder.is_dir():
        raise errors.UserError(f"--images {folder}: no such folder, expected the images of {path}")
    shards = annotations.of_file(path, folder, _LINES_PER_TASK)
    total = sum(shard.arguments["lines"] for shard in shards)
    workers = parallel.default_workers(total)
    read = parallel.ordered_map(_read, shards, workers=workers, chunk=1)
    return ImageSet(path, "annotations", itertools.chain.from_iterable(read), total)


def _read(shard: base.SourceShard) -> list[Item]:
    """The images of the lines, and the faults of the others, named as in data.build."""
    items: list[Item] = []
    for line, where in annotations.lines(shard):
        checked = example.check_line(line, shard.arguments["images"])
        items += [base.Fault(where, _cause(fault), fault, where) for fault in checked.faults]
        items += [checked.annotation._replace(where=where)] if checked.annotation else []
    return items


def _cause(fault: str) -> str:
    """`regions[3].box: got ...` -> `regions.box`: the part that all faults of a kind share."""
    head, colon, _ = fault.partition(":")
    return re.sub(r"\[\d+\]", "", head) if colon else "not a JSON object"
