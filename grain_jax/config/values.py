"""The values of a config, key by key; the part of them that defines a run, and the part that its digest counts."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from grain_jax.config import fields
from grain_jax.config.evals import NotImported


class Value(NamedTuple):
    """A key with its value."""

    key: str  # "model.image.width", "input.datasets[0].name"
    field: dataclasses.Field  # its declaration; within an entry of a dict, that of the dict
    owner: type  # the dataclass that declares it
    role: fields.Role | None  # its own, or that of its group
    value: Any  # no group


def walk(part: Any, path: str = "", role: fields.Role | None = None) -> Iterator[Value]:
    """Every key of a dataclass and of the groups, lists and dicts in it.

    Args:
      part: an instance: a Config, a group of one, or an evaluator.
      path: its key; "" for a whole config.
      role: of the group that it is.
    """

    def inside(key: str, field: dataclasses.Field, own: fields.Role | None, value: Any):
        if isinstance(value, NotImported):
            value = value.entry
        if dataclasses.is_dataclass(value):
            yield from walk(value, key, own)
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                yield from inside(f"{key}.{name}", field, own, inner)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, inner in enumerate(value):
                yield from walk(inner, f"{key}[{i}]", own)
        else:
            yield Value(key, field, type(part), own, value)

    for field in dataclasses.fields(part):
        key = f"{path}.{field.name}" if path else field.name
        own = field.metadata.get("role") or role
        yield from inside(key, field, own, getattr(part, field.name))


def select(config: fields.Config, roles: Collection[fields.Role]) -> dict[str, Any]:
    """The keys of those roles (`fields.Role`), flat, with their values."""
    return {one.key: one.value for one in walk(config) if one.role in roles}


def without_defaults(part: Any) -> dict[str, Any]:
    """The keys that differ from their default, flat: what digests count, so a new key changes no digest.

    Of a user's class (an evaluator, options) every key counts: the class that has the defaults need not be there.
    """
    return {
        one.key: one.value
        for one in walk(part)
        if one.owner.__module__.partition(".")[0] != "grain_jax"
        or one.value != fields.default_of(one.field)
    }


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    flat = {}
    for name, value in tree.items():
        flat |= (
            flatten(value, f"{path}{name}.")
            if isinstance(value, Mapping)
            else {f"{path}{name}": value}
        )
    return flat
