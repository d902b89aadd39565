"""A key: its declaration (`key`), and what reads declarations: words for people, types for msgspec, walks.

A group of keys is a frozen dataclass whose fields are declared with `key`.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

# What a resumed run is if the key has another value (docs/config_keys.md):
# - "order": the key decides which examples a step sees. The trainer refuses to resume.
# - "numbers": it decides what a step computes from them. `grain-jax sweep` calls it another run.
# - "result": it changes how a run starts or ends, or what is measured. A sweep calls it another run.
# - "free": it changes where a run computes, how fast, or what is kept and shown. It is the same run.
Role = Literal["order", "numbers", "result", "free"]

MOST = 2**31 - 1  # steps and sizes are int32 on the devices
WIDEST = 2**17  # several times any published width or image size; more is a typing error
DEEPEST = 10_000
_FINITE = 1e300


def key(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    role: Role | None = None,
    built_in: tuple[str, ...] = (),
    options_of: str = "",
    **flag: Any,
) -> Any:
    """The declaration of a key, or of a group of keys.

    Args:
      default: its value, or the class of a group with its defaults. Without a default the key must be set.
      help: what the key does, for `--help-config` and docs/config_keys.md.
      low: the smallest value.
      high: the largest value.
      choices: the possible values of a text.
      role: see Role; None takes the role of the group.
      built_in: names of the package. The key is one of them, or `module:Name` (grain_jax/core/named.py).
      options_of: a key of the same group that names a class. This group then has the keys of that class's
        `Options`, a frozen dataclass. A built-in name, or a class without `Options`, has NoOptions.
      **flag: what a command needs to make a flag of the key (evaluate/base.py, `option`).
    """
    declared = dict(help=help, low=low, high=high, choices=choices, role=role, built_in=built_in)
    declared |= {"options_of": options_of, **flag}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=declared)
    return dataclasses.field(default=default, metadata=declared)


def count(default: Any, help: str = "", *, low: float = 0, high: float = MOST, **more) -> Any:
    """`key` of a whole number of 32 bits."""
    return key(default, help, low=low, high=high, **more)


def size(default: Any, help: str = "") -> Any:
    """`key` of a size of a tower."""
    return count(default, help, low=1, high=WIDEST)


def layers(default: Any, help: str = "") -> Any:
    """`key` of a number of layers."""
    return count(default, help, low=1, high=DEEPEST)


def share(default: Any, help: str = "", **more) -> Any:
    """`key` of a number from 0 to 1."""
    return key(default, help, low=0, high=1, **more)


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a class without options, and of the built-in classes, which have keys of their own."""


class OpenGroup(dict[str, Any]):
    """A group of keys that its name alone does not define: an entry of `evals` or of `loss.terms`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Key:
    """A key as its class declares it."""

    name: str  # "patch_size"
    kind: Any  # its type
    default: Any  # dataclasses.MISSING if the key must be set
    declared: Mapping[str, Any]  # the other arguments of `key`
    owner: type  # the class

    @property
    def required_kind(self) -> Any:
        """T of a key of the type `T | None`."""
        if typing.get_origin(self.kind) not in (typing.Union, types.UnionType):
            return self.kind
        kinds = [arg for arg in typing.get_args(self.kind) if arg is not type(None)]
        return typing.Union[*kinds]

    @property
    def group(self) -> tuple[type | None, bool]:
        """(The class of a group, or of each group of a list; whether it is a list)."""
        inner = self.required_kind
        is_list = typing.get_origin(inner) is tuple
        inner = typing.get_args(inner)[0] if is_list else inner
        is_group = isinstance(inner, type) and dataclasses.is_dataclass(inner)
        return (inner if is_group else None), is_list

    @property
    def is_entries(self) -> bool:
        """Whether the key holds entries by name."""
        return typing.get_args(self.kind)[1:] == (OpenGroup,)

    @functools.cached_property
    def checked_kind(self) -> Any:
        """The type with the bounds or choices, which msgspec.convert checks."""
        low, high = self.declared.get("low"), self.declared.get("high")
        if choices := self.declared.get("choices"):
            inner: Any = Literal[choices]
        elif self.required_kind in (int, float) and (low is not None or high is not None):
            inner = _bounded(self.required_kind, low, high)
        else:
            inner = _with_finite_floats(self.required_kind)
        return inner | None if type(None) in typing.get_args(self.kind) else inner

    @property
    def type_words(self) -> str:
        """The type: "int", "float or None", "tuple of float"."""
        return "group" if self.declared.get("options_of") else _words(self.kind)

    @property
    def values_words(self) -> str:
        """Its values: "at least 1", "one of gelu, gelu_tanh"; "" if the type says it all."""
        declared = self.declared
        if declared.get("built_in"):
            return f"one of {', '.join(declared['built_in'])}, or module:Name"
        if declared.get("choices"):
            return f"one of {', '.join(declared['choices'])}"
        if declared.get("options_of"):
            return f"the options of the class that {declared['options_of']} names"
        bounds = {"at least": declared.get("low"), "at most": declared.get("high")}
        bounds = {word: x for word, x in bounds.items() if x is not None and abs(x) < MOST}
        if len(bounds) == 2:
            return " to ".join(f"{bound:,}" for bound in bounds.values())
        return "".join(f"{word} {bound:,}" for word, bound in bounds.items())

    @property
    def default_words(self) -> str:
        """The default as Python writes it; "" if the key must be set."""
        if self.default is dataclasses.MISSING:
            return ""
        if isinstance(self.default, NoOptions):
            return "{}"
        if dataclasses.is_dataclass(self.default):
            return "the keys below"
        return f"{self.default:.6g}" if isinstance(self.default, float) else repr(self.default)


class Item(NamedTuple):
    """A key of a whole config."""

    name: str  # "model.image.patch_size", "input.datasets[0].name"; "input.datasets[].name" without a value
    key: Key
    role: Role | None  # its own, or the role of its group
    value: Any  # its default without a config


@functools.cache
def keys_of(cls: type) -> dict[str, Key]:
    """The keys of a group by name."""
    hints, keys = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        factory: Any = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        keys[field.name] = Key(field.name, hints[field.name], default, field.metadata, cls)
    return keys


def listed(cls: type, path: str = "", role: Role | None = None) -> Iterator[Item]:
    """The keys of a class and of the groups in it, in the order of their declarations.

    Args:
      cls: a dataclass, such as Config.
      path: the key of that group; "" for a whole config.
      role: the role of that group.
    """
    for name, key in keys_of(cls).items():
        own_role = key.declared.get("role") or role
        name = f"{path}.{name}" if path else name
        inner, is_list = key.group
        if inner is None or is_list or inner is not key.kind:
            yield Item(name, key, own_role, key.default)
        if inner is not None:
            yield from listed(inner, name + "[]" * is_list, own_role)


def walk(part: Any, path: str = "", role: Role | None = None) -> Iterator[Item]:
    """Every key with its value, of an instance of a class as in `listed`."""

    def inside(name: str, key: Key, own_role: Role | None, value: Any) -> Iterator[Item]:
        if dataclasses.is_dataclass(value):
            yield from walk(value, name, own_role)
        elif isinstance(value, Mapping):
            for inner_name, inner in value.items():
                yield from inside(f"{name}.{inner_name}", key, own_role, inner)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, inner in enumerate(value):
                yield from walk(inner, f"{name}[{i}]", own_role)
        else:
            yield Item(name, key, own_role, value)

    for name, key in keys_of(type(part)).items():
        own_role = key.declared.get("role") or role
        yield from inside(f"{path}.{name}" if path else name, key, own_role, getattr(part, name))


def select(config: Any, roles: Collection[Role]) -> dict[str, Any]:
    """The keys of those roles, flat, with their values."""
    return {item.name: item.value for item in walk(config) if item.role in roles}


def without_defaults(part: Any) -> dict[str, Any]:
    """The keys that differ from their defaults, flat. Digests count these, so a new key changes no digest.

    All keys of a user's class count, since that class need not be there.
    """
    return {
        item.name: item.value
        for item in walk(part)
        if not item.key.owner.__module__.startswith("grain_jax.") or item.value != item.key.default
    }


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dicts as one dict, with keys joined by dots."""
    flat = {}
    for name, value in tree.items():
        inner = flatten(value, f"{path}{name}.") if isinstance(value, Mapping) else None
        flat |= {f"{path}{name}": value} if inner is None else inner
    return flat


def _bounded(kind: type, low: float | None, high: float | None) -> Any:
    if kind is float:  # NaN is below every bound
        low, high = -_FINITE if low is None else low, _FINITE if high is None else high
    return typing.Annotated[kind, msgspec.Meta(ge=low, le=high)]


def _with_finite_floats(kind: Any) -> Any:
    if kind is float:
        return _bounded(float, None, None)
    if typing.get_origin(kind) is tuple:
        inner = (arg if arg is ... else _with_finite_floats(arg) for arg in typing.get_args(kind))
        return tuple[*inner]
    return kind


def _words(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("None" if arg is type(None) else _words(arg) for arg in args)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        inner = [_words(arg) for arg in args if arg is not ...]
        return f"tuple of {inner[0]}" if ... in args else f"({', '.join(inner)})"
    if origin is dict:
        return "entries by name"
    return "group" if dataclasses.is_dataclass(kind) or kind is Any else kind.__name__
