"""Which keys define a run: the role that each declaration in `fields` has, and the part of a config by roles."""

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any

from grain_jax.config import fields, parse
from grain_jax.config.fields import Config, Role


def of_keys(cls: type = Config, role: Role | None = None, path: str = "") -> dict[str, Role | None]:
    """Key -> role; a key without one has the role of its group, None where neither has one.

    Args:
      cls: a dataclass.
      role: of the group that it is.
      path: the key of that group; "" for a whole config.
    """
    found = {}
    for name, (field, kind) in parse.types_of(cls).items():
        own = field.metadata.get("role") or role
        key = f"{path}.{name}" if path else name
        inner = _group(kind)
        found |= {key: own} if inner is None else of_keys(inner, own, key)
    return found


def select(config: Mapping[str, Any], roles: Collection[Role]) -> dict[str, Any]:
    """The keys of those roles, flat, with their values; tuples are lists, as in JSON.

    Args:
      config: a Config as a dict, also one that an older version stored: `added` keys may be missing.
      roles: see `fields.Role`.
    """
    return flatten(_select(config, roles, Config, None))


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}{name}.")
        else:
            flat[f"{path}{name}"] = value
    return flat


def _group(kind: Any) -> type | None:
    """The dataclass of a group, of an optional group, or of a list of groups; None for another type."""
    kind = parse.inner_of(kind)
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    return kind if dataclasses.is_dataclass(kind) and isinstance(kind, type) else None


def _select(
    part: Mapping[str, Any], roles: Collection[Role], cls: type, role: Role | None
) -> dict[str, Any]:
    found = {}
    for name, (field, kind) in parse.types_of(cls).items():
        own = field.metadata.get("role") or role
        value = part[name] if name in part else fields.default_of(field)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        inner = _group(kind)
        if inner is not None and isinstance(value, Mapping):
            found[name] = _select(value, roles, inner, own)
        elif inner is not None and isinstance(value, (list, tuple)):
            found[name] = [_select(entry, roles, inner, own) for entry in value]
        elif own in roles:
            found[name] = _as_in_json(value)
    return found


def _as_in_json(value: Any) -> Any:
    """The value with lists for tuples, also inside the options of a class of a user."""
    if isinstance(value, Mapping):
        return {key: _as_in_json(inner) for key, inner in value.items()}
    return [_as_in_json(inner) for inner in value] if isinstance(value, (list, tuple)) else value
