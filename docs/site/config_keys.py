"""The page of all config keys, made from their declarations."""

from collections.abc import Iterable

from grain_jax.config import evals, fields, listing

COMMON = ("kind", "missing", "get")  # keys of every evaluator


def markdown() -> str:
    """Sections of the page: a heading per group, a heading per key."""
    parts = []
    for group, keys in _by_group(listing.keys()).items():
        parts += [f"## `{group}`" if group else "## The run", *map(_key, keys)]
    parts.append("## Every evaluator")
    common = listing.keys(evals.Evaluator, "evals.NAME")
    parts += [_key(key, anchor=f"every.{key.name}") for key in common]
    for kind in evals.NAMED:
        parts.append(f"## Evaluator of kind `{kind}`")
        for key in listing.keys(evals.find(kind), "evals.NAME"):
            if key.name.rpartition(".")[2] not in COMMON:
                parts.append(_key(key, anchor=f"{kind}.{key.name}"))
    parts.append("## A suite")
    parts += [_key(key, anchor=f"suite.{key.name}") for key in listing.keys(fields.Suite)]
    return "\n\n".join(parts)


def _by_group(keys: Iterable[listing.Key]) -> dict[str, list[listing.Key]]:
    found: dict[str, list[listing.Key]] = {}
    for key in keys:
        found.setdefault(key.name.rpartition(".")[0], []).append(key)
    return found


def _key(key: listing.Key, anchor: str = "") -> str:
    facts = [f"`{key.type}`", f"default `{key.default}`" if key.default else "must be given"]
    facts += [key.values] if key.values else []
    facts += [f"role *{key.role}*"] if key.role else []
    anchor = (anchor or key.name).replace("[]", "")
    comment = key.comment[0].upper() + key.comment[1:]
    return f"#### `{key.name}` {{ #{anchor} }}\n\n{comment}\n\n{' · '.join(facts)}\n{{ .facts }}"
