"""Every config key with what its declaration says of it, for readers: type, default, bounds, role and comment."""

import ast
import dataclasses
import functools
import inspect
import io
import math
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from grain_jax.config import fields, parse
from grain_jax.config.evals import Evaluator


class Key(NamedTuple):
    """One key, in words."""

    name: str  # "model.image.patch_size"; "[]" after a list of groups
    type: str  # "int", "float or None", "tuple of float"
    default: str  # as Python writes it; "" where the key must be given
    values: str  # "at least 1", "one of gelu, gelu_tanh"; "" for any of the type
    role: fields.Role | None  # None where neither the key nor its group has one
    comment: str  # of the declaration, in one line; "" for none


def keys(
    cls: type = fields.Config, path: str = "", role: fields.Role | None = None
) -> Iterator[Key]:
    """The keys of a dataclass and of its groups, in the order of their declarations.

    Args:
      cls: a dataclass; by default that of a whole config.
      path: the key of that group; "" for a whole config.
      role: of the group.
    """
    said = comments(cls)
    for name, (field, kind) in parse.types_of(cls).items():
        own = field.metadata.get("role") or role
        key = f"{path}.{name}" if path else name
        inner, is_list = _group(kind)
        if inner is not None and not is_list and inner is kind:
            yield from keys(inner, key, own)
            continue
        default = fields.default_of(field)
        yield Key(key, _words(kind), _shown(default), _values(field), own, said.get(name, ""))
        if inner is not None:
            yield from keys(inner, key + "[]" * is_list, own)


def comments(cls: type) -> dict[str, str]:
    """The comment of each field of a class and of its bases: above its declaration and beside it, in one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            own = _comments_of(typing.cast(type, base))
            found |= {name: comment for name, comment in own.items() if comment}
    return found


@functools.cache
def _comments_of(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    statements = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    return {
        node.target.id: comment_at(source, node.lineno, node.end_lineno or node.lineno)
        for node in statements
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def comment_at(source: str, first: int, last: int) -> str:
    """What the comments above and beside the statement of these lines say, in one line; "" for nothing."""
    found = _comments_in(source)
    while found.get(first - 1, ("", False))[1]:
        first -= 1
    return " ".join(found[line][0] for line in range(first, last + 1) if line in found)


@functools.cache
def _comments_in(source: str) -> dict[int, tuple[str, bool]]:
    """Line -> (its comment, whether it has nothing else)."""
    return {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }


def _group(kind: Any) -> tuple[type | None, bool]:
    """(The dataclass of a group, of an optional group or of a list of groups, whether it is a list)."""
    inner = parse.inner_of(kind)
    is_list = typing.get_origin(inner) is tuple
    inner = typing.get_args(inner)[0] if is_list else inner
    known = dataclasses.is_dataclass(inner) and isinstance(inner, type) and inner is not Evaluator
    return (typing.cast(type, inner) if known else None), is_list


def _words(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return f"{_words(parse.inner_of(kind))} or None"
    if origin is tuple:
        of = list(dict.fromkeys(map(_words, (arg for arg in args if arg is not Ellipsis))))
        return f"tuple of {of[0]}" if len(of) == 1 else f"({', '.join(of)})"
    if origin is dict:
        return "entries by name"
    if dataclasses.is_dataclass(kind):
        return "group"
    return "group" if kind is Any else kind.__name__


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return ""
    if isinstance(default, fields.NoOptions):
        return "{}"
    if dataclasses.is_dataclass(default):
        return "the keys below"
    return f"{default:.6g}" if isinstance(default, float) else repr(default)


def _values(field: dataclasses.Field) -> str:
    declared = field.metadata
    if declared.get("built_in"):
        return f"one of {', '.join(declared['built_in'])}, or module:Name"
    if declared.get("choices"):
        return f"one of {', '.join(declared['choices'])}"
    if declared.get("options_of"):
        return f"the options of the class that {declared['options_of']} names"
    low, high = declared.get("low", -math.inf), declared.get("high", math.inf)
    low, high = (None if math.isinf(x) or abs(x) >= fields.MOST else x for x in (low, high))
    if low is not None and high is not None:
        return f"{low:,} to {high:,}"
    if low is not None:
        return f"at least {low:,}"
    return "" if high is None else f"at most {high:,}"
