"""Reads the JSON files of public data sets, of which some have gigabytes."""

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from etils import epath

from grain_jax.core import regular_file
from grain_jax.data.sources.base import Fault, SourceError

MAX_FILE = 4 << 30  # bytes of one that is read at once; LVIS has 1.1 GB
_MAX_ITEM = 64 << 20  # characters of an item of a list
_CHUNK = 1 << 20  # characters of a list that are read at once
_BETWEEN = re.compile(r"[\s,]*")  # items of a list
T = TypeVar("T")


def read_list(path: epath.PathLike, kind: type[T], expected: str) -> Iterator[T | Fault]:
    """The items of a file that holds one list, one at a time; of one in another form its fault.

    Raises SourceError, regular_file.FileError.
    """
    ends = json.JSONDecoder(parse_int=len, parse_float=len)  # where an item ends; `item` reads it
    number = 0
    with regular_file.opened(path, expected, "r") as (file, _):
        buffer, at = file.read(_CHUNK).lstrip(), 1
        if buffer[:1] != "[":
            raise SourceError(f"{path}: got {buffer[:20]!r}, expected a list: {expected}")
        while True:
            at = _BETWEEN.match(buffer, at).end()
            if buffer[at : at + 1] == "]":
                return
            try:
                end = ends.raw_decode(buffer, at)[1]
            except (json.JSONDecodeError, RecursionError) as error:
                buffer, at = buffer[at:], 0
                reason, more = getattr(error, "msg", "nested too deep"), ""
                if isinstance(error, json.JSONDecodeError):  # broken, or its end is not read yet
                    more = file.read(max(_CHUNK, len(buffer)))  # long items are not read often
                if not more or len(buffer) > _MAX_ITEM:
                    where = f"{path}[{number}]: not a JSON list ({reason})"
                    raise SourceError(f"{where}, expected a list: {expected}") from None
                buffer += more
                continue
            yield item(buffer[at:end].encode(), kind, f"{path}[{number}]", expected)
            number, at = number + 1, end


def item(value: Any, kind: type[T], where: str, expected: str) -> T | Fault:
    """A JSON text as the declared form; else the fault of what stands at `where`."""
    try:
        return regular_file.from_json(value, kind, where, expected)
    except regular_file.FileError as error:
        return Fault(where, "bad annotation", str(error).removeprefix(f"{where}: "))
