"""Reads a record set or an A.jsonl as a stream of images and faults, as data sources give them."""

import functools
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from grain_jax.core import errors
from grain_jax.data import example, parallel
from grain_jax.data.sources import base, tfds

Item = base.Image | base.Fault


class Source(NamedTuple):
    """A set, not read yet."""

    path: epath.Path
    kind: str  # "TFDS records" or "annotations"
    items: Iterator[Item]
    total: int  # images that the set claims to hold


def open_set(path: epath.PathLike, images: epath.PathLike | None) -> Source:
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
        return Source(directory, "TFDS records", items, total)
    folder = epath.Path(path.parent if images is None else images)
    if not folder.is_dir():
        raise errors.UserError(f"--images {folder}: no such folder, expected the images of {path}")
    total = example.count_lines(path)
    read = functools.partial(_read_line, file=path.name, folder=str(folder))
    workers = parallel.default_workers(total)
    found = parallel.ordered_map(read, example.read_lines(path), workers=workers)
    return Source(path, "annotations", itertools.chain.from_iterable(found), total)


def _read_line(line: example.Line, *, file: str, folder: str) -> list[Item]:
    """The image of a line, or its faults, named as in data.build."""
    where = f"{file}:{line.number}"
    checked = example.check_line(line.text, folder)
    annotation = checked.annotation
    if annotation is None:
        return [base.Fault(where, _cause(fault), fault, where) for fault in checked.faults]
    return [
        base.Image(
            annotation.image,
            checked.encoded,
            annotation.captions,
            annotation.synthetic_caption,
            annotation.regions,
            annotation.id,
            where=where,
        )
    ]


def _cause(fault: str) -> str:
    """`regions[3].box: got ...` -> `regions.box`: the part that all faults of a kind share."""
    head, colon, _ = fault.partition(":")
    return re.sub(r"\[\d+\]", "", head) if colon else "not a JSON object"
