"""Reads the JSON files of public data sets, of which some have gigabytes."""

from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from etils import epath
from grain_jax.data.sources.base import Fault

from grain_jax.files import regular_file

_MAX_FILE = 4 << 30  # bytes; LVIS has 1.1 GB
T = TypeVar("T")


def read(path: epath.PathLike, kind: type[T], expected: str) -> T:
    """The JSON value in a file, of the declared form. Raises regular_file.FileError."""
    return regular_file.read_json(path, kind, expected, _MAX_FILE)


def read_list(path: epath.PathLike, kind: type[T], expected: str) -> Iterator[T | Fault]:
    """The items of a file that holds one list; of one in another form its fault. Raises regular_file.FileError."""
    for number, raw in enumerate(read(path, list[msgspec.Raw], f"a list: {expected}")):
        yield item(raw, kind, f"{path}[{number}]", expected)


def item(value: Any, kind: type[T], where: str, expected: str) -> T | Fault:
    """A msgspec.Raw as the declared form; else the fault of what stands at `where`."""
    try:
        return regular_file.from_json(value, kind, where, expected)
    except regular_file.FileError as error:
        return Fault(where, "bad annotation", str(error).removeprefix(f"{where}: "))
