"""Makes a source from its own options, which come as texts: `--option KEY=VALUE`."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from grain_jax.data.sources.base import Source, SourceError

from grain_jax import config

_BOOLS = {"true": True, "false": False}


def make(name: str, cls: Any, texts: Mapping[str, str]) -> Source:
    """An instance of a source's class.

    Args:
      name: of the source, for errors.
      cls: its class. Options are the fields of a dataclass: str, int, float or bool, each with a default.
      texts: value of each option that was given.

    Raises:
      SourceError: the class is no source, there is no such option, or a value is of another type or refused by the
        class (a ValueError of its `__post_init__`).
    """
    missing = [x for x in ("images_are_files", "shards", "read") if not hasattr(cls, x)]
    if missing or not isinstance(cls, type):
        what = f"a class without {', '.join(missing)}" if isinstance(cls, type) else "no class"
        raise SourceError(
            f"data source {name!r}: got {what}, expected one as data/sources/base.py: Source describes"
        )
    hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
    known = [field.name for field in dataclasses.fields(cls)] if hints else []
    values = {}
    for key, text in texts.items():
        if key not in known:
            said = config.unknown_key(key, known) if known else "the source has no options"
            raise SourceError(f"--option {key} of data source {name!r}: {said}")
        values[key] = _typed(key, text, hints[key])
    try:
        return cls(**values)
    except ValueError as error:
        raise SourceError(f"--option of data source {name!r}: {error}") from None


def _typed(key: str, text: str, kind: type) -> Any:
    try:
        return _BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, kind)
        raise SourceError(f"--option {key}: got {text!r}, expected {expected}") from None
