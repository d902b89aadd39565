"""From a dict to the classes of `fields`, and back.

An unknown key is an error that names the nearest one. A key that is not set has its default.
"""

import dataclasses
import functools
import inspect
import json
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from grain_jax.config import checks, keys
from grain_jax.config.fields import Config, Model
from grain_jax.config.keys import Key, NoOptions, OpenGroup
from grain_jax.core import errors, named, nearest

T = typing.TypeVar("T")


class ConfigError(errors.UserError):
    """The configuration cannot be used; the message has one line for each fault."""


def from_dict(value: Mapping[str, Any]) -> Config:
    """A plain dict, or a ConfigDict of ml_collections, as a checked Config. Raises ConfigError."""
    config = build(Config, value)
    faults = checks.faults_of(config)
    for name, entry in config.loss.terms.items():
        term = entry.get("term")
        if isinstance(term, str) and named.is_external(term) and named.may_import(term):
            try:
                loss_term(f"loss.terms.{name}", entry, {})
            except errors.UserError as error:
                faults.append(str(error))
    raise_faults(faults)
    return config


def model_from_dict(value: Mapping[str, Any]) -> Model:
    """The `model` part alone, as finished models carry it. Raises ConfigError."""
    model = build(Model, value, "model")
    raise_faults(checks.faults_of(model))
    return model


def build(cls: type[T], value: Any, path: str = "") -> T:
    """An instance of a group of keys (`keys.key`).

    Args:
      cls: the class of the group.
      value: a mapping from the names of its keys to their values.
      path: the key of the group, for error messages; "" for a whole config.

    Raises:
      ConfigError: a key is unknown, missing, of another type or out of bounds; a line for each fault.
    """
    faults: list[str] = []
    built = _group(cls, value.to_dict() if hasattr(value, "to_dict") else value, path, faults)
    raise_faults(faults)
    assert built is not None
    return built


def raise_faults(faults: list[str]) -> None:
    """Raises ConfigError if there is a fault."""
    if faults:
        raise ConfigError("\n".join(faults))


def _group(cls: type[T], value: Any, path: str, faults: list[str]) -> T | None:
    """The instance; None after a fault."""
    if not isinstance(value, Mapping):
        faults.append(f"{path}: got {value!r}, expected a group of keys")
        return None
    known, values, before = keys.keys_of(cls), {}, len(faults)
    full = {name: f"{path}.{name}" if path else str(name) for name in [*known, *value]}
    for name in value:
        if name not in known:
            hint = unknown_key(full[name], [full[key] for key in known])
            faults.append(f"{full[name]}: {hint}")
    for name, key in known.items():
        if key.declared.get("options_of"):
            values[name] = _options(key, value, path, faults)
        elif name in value:
            values[name] = _convert(key, value[name], full[name], faults)
        elif key.default is dataclasses.MISSING:
            faults.append(f"{full[name]}: missing; it has no default")
    try:
        return cls(**values) if len(faults) == before else None
    except ValueError as error:  # from the class's own check of its options
        faults.append(f"{path}: {error}")
        return None


def _convert(key: Key, value: Any, path: str, faults: list[str]) -> Any:
    """The value with the type of the key; None after a fault."""
    inner, is_list = key.group
    if is_list and inner is not None and isinstance(value, list | tuple):
        return tuple(_group(inner, part, f"{path}[{i}]", faults) for i, part in enumerate(value))
    if inner is not None and not is_list:
        optional = inner is not key.kind
        return None if value is None and optional else _group(inner, value, path, faults)
    if key.is_entries:
        return _entries(value, path, faults)
    try:
        converted = msgspec.convert(_plain(value), key.checked_kind)
    except msgspec.ValidationError:
        converted = None
        finite = not isinstance(value, float) or math.isfinite(value)
        wanted = expected(key) if finite else "a finite number"
        faults.append(f"{path}: got {value!r}, expected {wanted}")
    built_in = key.declared.get("built_in")
    if built_in and converted and converted not in built_in and not named.is_external(converted):
        faults.append(f"{path}: got {value!r}, expected {expected(key)}")
    return converted


def _plain(value: Any) -> Any:
    """The value with Python's own numbers for numpy's, as configs that compute have."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return float(value) if isinstance(value, float) else value


def expected(key: Key) -> str:
    """The type and the values of a key, in words."""
    is_named = key.declared.get("choices") or key.declared.get("built_in")
    return ", ".join(filter(None, ["" if is_named else key.type_words, key.values_words]))


def _entries(value: Any, path: str, faults: list[str]) -> dict[str, OpenGroup]:
    entries = value if isinstance(value, Mapping) else {}
    for name, entry in {"": value, **{f".{name}": entry for name, entry in entries.items()}}.items():
        if not isinstance(entry, Mapping):
            faults.append(f"{path}{name}: got {entry!r}, expected a group of keys")
    return {
        name: OpenGroup({k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
        for name, entry in entries.items()
        if isinstance(entry, Mapping)
    }


def _options(key: Key, group: Mapping[str, Any], path: str, faults: list[str]) -> Any:
    """The options of the class that a key of the group names.

    They stay as they are if the class may not be imported (grain_jax/core/named.py).
    """
    names_class = key.declared["options_of"]
    name, value = group.get(names_class, ""), group.get(key.name)
    cls, prefix = NoOptions, f"{path}." if path else ""
    if isinstance(name, str) and named.is_external(name):
        if not named.may_import(name):
            return value or {}
        try:
            cls = getattr(named.find(prefix + names_class, name, {}), "Options", None) or cls
        except errors.UserError as error:
            faults.append(str(error))
            return value
    if cls is NoOptions and value:
        faults.append(f"{prefix}{key.name}: got {value}, but {prefix}{names_class}={name} has no options")
    return _group(cls, value or {}, prefix + key.name, faults) if cls is not NoOptions else cls()


class LocalEntry(typing.NamedTuple):
    """A local loss term (grain_jax/losses/local.py) as `loss.terms` names it."""

    cls: Any  # a class that derives from losses.local.LocalTerm
    options: Any  # an instance of its Options


def loss_term(path: str, entry: Mapping[str, Any], table: Mapping[str, Any]) -> Any:
    """The function of an entry of `loss.terms` with its options, or the LocalEntry of a local term.

    Args:
      path: its key, for error messages.
      entry: `term`, `weight` and the options. The term is a function `term(shard, *, option: float = 1.0)`, a
        frozen dataclass with the options as fields and `__call__(self, shard)`, or a class that derives from
        losses.local.LocalTerm.
      table: terms by name, which `term` may name instead of `module:Name`.

    Raises:
      UserError: the term cannot be found, or an option is unknown, missing, of another type or out of bounds.
    """
    target = named.find(f"{path}.term: loss term", entry["term"], table)
    options = {key: value for key, value in entry.items() if key not in ("term", "weight")}
    if isinstance(target, type) and hasattr(target, "Options"):
        return LocalEntry(target, build(target.Options, options, path))
    if isinstance(target, type) and dataclasses.is_dataclass(target):
        return build(target, options, path)
    if isinstance(target, type) or not callable(target):
        raise errors.UserError(
            f"{path}.term: {entry['term']!r} is {target!r}, expected a function of a losses.Shard, a frozen"
            " dataclass with __call__(self, shard), or a class that derives from losses.local.LocalTerm"
        )
    values = vars(build(_parameters_of(target, path), options, path))
    return functools.partial(target, **values) if values else target


def _parameters_of(function: Callable, path: str) -> type:
    """A dataclass with the keyword parameters of a loss term as fields."""
    hints, fields = typing.get_type_hints(function), []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.name not in hints:
            raise errors.UserError(
                f"{path}.term: it has the parameter {parameter},"
                " expected (shard, *, option: type = default, ...)"
            )
        default = dataclasses.MISSING if parameter.default is parameter.empty else parameter.default
        fields.append((parameter.name, hints[parameter.name], dataclasses.field(default=default)))
    return dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)


def unknown_key(path: str, known: list[str]) -> str:
    """The words for a key that does not exist, with the nearest one of `known`, or the keys of its group."""
    return f"no such key; {nearest.did_you_mean(path, known)}"


def to_json(config: Any) -> str:
    """A Config, or a part of one, as indented JSON that `from_dict` reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
