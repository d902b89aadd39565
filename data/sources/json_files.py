"""Reads the JSON files of public data sets, of which some have gigabytes."""

import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath
from grain_jax.data.sources.base import SourceError

from grain_jax.files import annotations

_CHUNK = 1 << 20  # characters of a long JSON list that are read at once
_BETWEEN = re.compile(r"[\s,]*")  # items of such a list


def read_json(path: epath.PathLike, *, expected: str) -> Any:
    """The JSON value in a file. Raises SourceError."""
    path = epath.Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}, expected {expected}") from None
    except ValueError as error:
        raise SourceError(f"{path}: not JSON ({error}), expected {expected}") from None


def read_json_list(path: epath.PathLike, *, expected: str) -> Iterator[dict[str, Any]]:
    """The objects of a file that holds one JSON list, one at a time: such files have gigabytes.

    Raises SourceError.
    """
    path, decoder = epath.Path(path), json.JSONDecoder()
    if not path.exists() or path.is_dir():
        raise SourceError(f"{path}: no such file, expected {expected}")
    with path.open("r", encoding="utf-8") as file:

        def read() -> str:
            try:
                return file.read(_CHUNK)
            except UnicodeDecodeError:
                raise SourceError(f"{path}: not UTF-8 text, expected {expected}") from None

        buffer, at = read().lstrip(), 1
        if buffer[:1] != "[":
            raise SourceError(f"{path}: got {buffer[:20]!r}, expected {expected}")
        while True:
            at = _BETWEEN.match(buffer, at).end()
            if buffer[at : at + 1] == "]":
                return
            try:
                item, at = decoder.raw_decode(buffer, at)
            except ValueError as error:  # it ends in what is not read yet, or it is broken
                more = read()
                if not more:
                    reason = f"not a JSON list ({error.msg}), expected {expected}"
                    raise SourceError(f"{path}: {reason}") from None
                buffer, at = buffer[at:] + more, 0
                continue
            if not isinstance(item, dict):
                got = annotations.show(item)
                raise SourceError(f"{path}: got {got} in the list, expected {expected}")
            yield item
