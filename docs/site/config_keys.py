"""The page of all config keys, made from their declarations."""

from collections.abc import Iterable

from grain_jax.config.fields import Config
from grain_jax.config.keys import Item, listed
from grain_jax.evaluate import base, kinds

COMMON = ("kind", "missing", "get")  # keys of every evaluator


def markdown() -> str:
    """Sections of the page: a heading per group, a heading per key."""
    groups: dict[str, list[Item]] = {}
    for item in listed(Config):
        groups.setdefault(item.name.rpartition(".")[0], []).append(item)
    parts = []
    for group, items in groups.items():
        parts += [f"## `{group}`" if group else "## The run", *map(_key, items)]
    parts += _section("Every evaluator", listed(base.Evaluator, "evals.NAME"), "every")
    for kind in kinds.KINDS:
        items = listed(kinds.find(kind), "evals.NAME")
        options = [item for item in items if item.key.name not in COMMON]
        parts += _section(f"Evaluator of kind `{kind}`", options, kind)
    parts += _section("A suite", listed(kinds.SuiteConfig), "suite")
    return "\n\n".join(parts)


def _section(title: str, items: Iterable[Item], anchor: str) -> list[str]:
    return [f"## {title}", *(_key(item, f"{anchor}.{item.name}") for item in items)]


def _key(item: Item, anchor: str = "") -> str:
    key = item.key
    default = f"default `{key.default_words}`" if key.default_words else "must be given"
    facts = [f"`{key.type_words}`", default, key.values_words]
    facts += [f"role *{item.role}*"] if item.role else []
    anchor = (anchor or item.name).replace("[]", "")
    text = f"#### `{item.name}` {{ #{anchor} }}\n\n{key.declared['help']}"
    return f"{text}\n\n{' · '.join(filter(None, facts))}\n{{ .facts }}"
