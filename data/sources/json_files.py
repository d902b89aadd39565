"""Reads the JSON files of public data sets, of which some have gigabytes."""

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from etils import epath
from grain_jax.data.sources.base import Fault, SourceError

from grain_jax.files import annotations, regular_file

_MAX_FILE = 4 << 30  # bytes that are read at once; LVIS has 1.1 GB
_MAX_ITEM = 64 << 20  # characters of an item of a list
_CHUNK = 1 << 20  # characters of a long JSON list that are read at once
_BETWEEN = re.compile(r"[\s,]*")  # items of such a list
T = TypeVar("T")


def read_json(path: epath.PathLike, kind: type[T], expected: str) -> T:
    """The JSON value in a file, of the declared form. Raises regular_file.FileError."""
    return regular_file.read_json(path, kind, expected, _MAX_FILE)


def item(value: Any, kind: type[T], where: str, expected: str) -> T | Fault:
    """An item of a list, of the declared form; else the fault of what stands at `where`.

    Args:
      value: a msgspec.Raw, or what JSON's reader made of it.
    """
    check = regular_file.from_json if isinstance(value, msgspec.Raw) else regular_file.checked
    try:
        return check(value, kind, where, expected)
    except regular_file.FileError as error:
        return Fault(where, "bad annotation", str(error).removeprefix(f"{where}: "))


def read_json_list(path: epath.PathLike, *, expected: str) -> Iterator[dict[str, Any]]:
    """The objects of a file that holds one JSON list, one at a time: such files have gigabytes.

    Raises SourceError, regular_file.FileError.
    """
    decoder = json.JSONDecoder()
    with regular_file.opened(path, expected, "r") as (file, _):
        buffer, at = file.read(_CHUNK).lstrip(), 1
        if buffer[:1] != "[":
            raise SourceError(f"{path}: got {buffer[:20]!r}, expected {expected}")
        while True:
            at = _BETWEEN.match(buffer, at).end()
            if buffer[at : at + 1] == "]":
                return
            try:
                item, at = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:  # it ends in what is not read yet, or is broken
                buffer, at = buffer[at:], 0
                more = file.read(max(_CHUNK, len(buffer)))  # so that long items are not read often
                if not more or len(buffer) > _MAX_ITEM:
                    reason = f"not a JSON list ({error.msg}), expected {expected}"
                    raise SourceError(f"{path}: {reason}") from None
                buffer += more
                continue
            except (ValueError, RecursionError):
                reason = "an item is nested too deep, or has too long a number"
                raise SourceError(f"{path}: {reason}, expected {expected}") from None
            if not isinstance(item, dict):
                got = annotations.show(item)
                raise SourceError(f"{path}: got {got} in the list, expected {expected}")
            yield item
