"""From a dict to the classes of `fields`, and back.

Every key is consumed: a misspelt or left-over one is an error that names the nearest key. One that is not given has its
default.
"""

import dataclasses
import functools
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from grain_jax.config import checks, evals, fields
from grain_jax.config.evals import Evaluator
from grain_jax.config.fields import Config, Model, Suite
from grain_jax.core import errors, named, nearest

T = typing.TypeVar("T")


class ConfigError(errors.UserError):
    """The configuration cannot be used; the message has one line a fault."""


def from_dict(value: Mapping[str, Any]) -> Config:
    """A plain dict, or ml_collections' ConfigDict, as a checked Config. Raises ConfigError, a line a fault."""
    config = _checked(Config, value, "")
    faults: list[str] = []
    for name, entry in config.loss.terms.items():
        if named.is_external(entry["term"]) and named.may_import(entry["term"]):
            try:
                loss_term(f"loss.terms.{name}", entry, {})
            except errors.UserError as error:
                faults.append(str(error))
    _end(faults)
    return config


def model_from_dict(value: Mapping[str, Any]) -> Model:
    """The `model` part alone, as converted checkpoints carry it. Raises ConfigError, a line a fault."""
    return _checked(Model, value, "model")


def suite_from_dict(value: Mapping[str, Any]) -> Suite:
    """The config of a suite, a plain dict or a ConfigDict, checked. Raises ConfigError, a line a fault."""
    return _checked(Suite, value, "")


def evaluator_from_dict(value: Any) -> Evaluator:
    """An entry of `evals`, a plain dict or a ConfigDict, checked. Raises ConfigError, a line a fault."""
    return _checked(Evaluator, value, "evaluator")


def _checked(kind: Any, value: Any, path: str) -> Any:
    """The value as an instance of that class, without a fault. Raises ConfigError."""
    built = _built(kind, value.to_dict() if hasattr(value, "to_dict") else value, path)
    _end(checks.faults_of(built, path))
    return built


def _built(kind: Any, value: Any, path: str) -> Any:
    faults: list[str] = []
    built = _convert(kind, value, path, faults)
    _end(faults)
    return built


def _end(faults: list[str]) -> None:
    if faults:
        raise ConfigError("\n".join(faults))


def _evaluator(value: Any, path: str, faults: list[str]) -> Evaluator | None:
    """An entry of `evals` as an instance of the class that its `kind` names."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str):
        got = repr(value) if kind is None else f"kind={kind!r}"
        known = ", ".join(evals.NAMED)
        faults.append(
            f"{path}: got {got}, expected a group with kind: one of {known}, or module:Class"
        )
        return None
    if not named.may_import(kind):
        return evals.NotImported(kind=kind, entry=value)
    try:
        cls = evals.find(kind)
    except errors.UserError as error:
        faults.append(f"{path}.kind: {error}")
        return None
    return build(cls, value, path, faults)


def build(cls: type[T], value: Any, path: str, faults: list[str]) -> T | None:
    """An instance of a dataclass whose fields are declared with `fields.key`.

    Args:
      cls: the dataclass.
      value: a mapping from the names of its fields to their values.
      path: its key, for the faults; "" for a whole config.
      faults: gets a line for each key that is unknown, of another type, or missing without a default.

    Returns:
      The instance, or None where a key is missing. Only without faults may it be used.
    """
    if not isinstance(value, Mapping):
        faults.append(f"{path}: got {value!r}, expected a group of keys")
        return None
    known = types_of(cls)
    places = {key: _at(path, key) for key in known}
    for place in (_at(path, key) for key in value if key not in known):
        faults.append(f"{place}: {unknown_key(place, list(places.values()))}")
    given, missing = {}, False
    for key, (field, kind) in known.items():
        if field.metadata.get("options_of"):
            given[key] = _options_of(field.metadata["options_of"], field, value, path, faults)
        elif key in value:
            given[key] = _convert(kind, value[key], places[key], faults)
        elif fields.default_of(field) is dataclasses.MISSING:
            faults.append(f"{places[key]}: missing; it has no default")
            missing = True
    try:
        return None if missing else cls(**given)
    except ValueError as error:  # of a class's own check of its options
        faults.append(f"{path}: {error}")
        return None


def _at(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _options_of(
    owner: str, field: dataclasses.Field, group: Mapping[str, Any], path: str, faults: list[str]
) -> Any:
    """The options of the class that `group[owner]` names, in the field of that group.

    Where the class may not be imported (grain_jax/core/named.py), they stay as they are.
    """
    name, value = group.get(owner, ""), group.get(field.name)
    cls = fields.NoOptions
    if isinstance(name, str) and named.is_external(name):
        if not named.may_import(name):
            return value or {}
        try:
            cls = getattr(named.find(_at(path, owner), name, {}), "Options", None) or cls
        except errors.UserError as error:
            faults.append(str(error))
            return value
    if cls is not fields.NoOptions:
        return build(cls, value or {}, _at(path, field.name), faults)
    if value:
        given = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)
        faults.append(
            f"{_at(path, field.name)}: got {given}, but {_at(path, owner)}={name} has no options"
        )
    return cls()


def _term_entry(value: Any, path: str, faults: list[str]) -> fields.TermEntry:
    if not isinstance(value, Mapping):
        faults.append(f"{path}: got {value!r}, expected a group of keys")
        return fields.TermEntry()
    weight = value.get("weight")
    if type(weight) not in (int, float) or not abs(weight) < 1e300:
        faults.append(f"{path}.weight: got {weight!r}, expected a finite number")
    entry = {key: _convert(Any, inner, path, faults) for key, inner in value.items()}
    return fields.TermEntry(entry)


class LocalEntry(typing.NamedTuple):
    """A local loss term (grain_jax/losses/local.py) as `loss.terms` names it."""

    cls: Any  # a class that derives from losses.local.LocalTerm
    options: Any  # an instance of its Options


def loss_term(path: str, entry: Mapping[str, Any], table: Mapping[str, Any]) -> Any:
    """The function of an entry of `loss.terms`, with its options; of a local term its class, a LocalEntry.

    Args:
      path: its key, for errors.
      entry: `term`, `weight` and the options. The term is a function `term(shard, *, option: float = 1.0)`, a frozen
        dataclass with the options as fields and `__call__(self, shard)`, or a class that derives from
        losses.local.LocalTerm.
      table: terms by name, which `term` may name instead of `module:Name`.

    Raises:
      UserError: the term cannot be found, or an option is unknown, missing, of another type, or of a local term out of
        its bounds.
    """
    target = named.find(f"{path}.term: loss term", entry["term"], table)
    options = {key: value for key, value in entry.items() if key not in ("term", "weight")}
    if isinstance(target, type) and hasattr(target, "Options"):
        given = _built(target.Options, options, path)
        _end(list(checks.of_values(given, path)))
        return LocalEntry(target, given)
    if dataclasses.is_dataclass(target):
        return _built(target, options, path)
    if isinstance(target, type) or not callable(target):
        raise errors.UserError(
            f"{path}.term: {entry['term']!r} is {target!r}, expected a function of a losses.Shard, a frozen"
            " dataclass with __call__(self, shard), or a class that derives from losses.local.LocalTerm"
        )
    options = vars(_built(_parameters_of(target, path), options, path))
    return functools.partial(target, **options) if options else target


def _parameters_of(function: Callable, path: str) -> type:
    """A dataclass with the keyword parameters of a loss term as fields."""
    hints = typing.get_type_hints(function)
    found = []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.name not in hints:
            raise errors.UserError(
                f"{path}.term: it has the parameter {parameter}, expected (shard, *, option: type = default, ...)"
            )
        default = dataclasses.MISSING if parameter.default is parameter.empty else parameter.default
        found.append((parameter.name, hints[parameter.name], dataclasses.field(default=default)))
    return dataclasses.make_dataclass("Options", found, frozen=True, kw_only=True)


@functools.cache
def types_of(cls: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    """The fields of a dataclass by name, each with its resolved type."""
    hints = typing.get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls)}


def _convert(kind: Any, value: Any, path: str, faults: list[str]) -> Any:
    """`value` as an instance of the annotated type `kind`; what does not fit is added to `faults`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:  # JSON has lists for tuples
        return tuple(value) if isinstance(value, list) else value
    if kind is Evaluator:
        return _evaluator(value, path, faults)
    if kind is fields.TermEntry:
        return _term_entry(value, path, faults)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, path, faults)
    if origin is dict:
        if not isinstance(value, Mapping):
            faults.append(f"{path}: got {value!r}, expected a group of keys")
            return {}
        return {k: _convert(args[1], v, f"{path}.{k}", faults) for k, v in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(inner_of(kind), value, path, faults)
    if origin is tuple:
        inner = args[:1] * len(value) if args[-1] is Ellipsis and _is_list(value) else args
        if not _is_list(value) or len(inner) != len(value):
            faults.append(f"{path}: got {value!r}, expected a list")
            return ()
        numbered = dataclasses.is_dataclass(args[0])
        paths = [f"{path}[{i}]" if numbered else path for i in range(len(value))]
        return tuple(_convert(*part, faults) for part in zip(inner, value, paths))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        faults.append(f"{path}: got {value}, expected a finite number")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        faults.append(f"{path}: got {value!r}, expected {kind.__name__}")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def inner_of(kind: Any) -> Any:
    """T of the type `T | None`; another type as it is."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind
    return next(arg for arg in typing.get_args(kind) if arg is not type(None))


def unknown_key(path: str, known: list[str]) -> str:
    """The words for a key that does not exist, with the nearest one of `known`, or those of its group."""
    return f"no such key; {nearest.did_you_mean(path, known)}"


def to_json(config: Any) -> str:
    """A Config (or a part of one) as indented JSON that `from_dict` reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
