"""The text of `--help-config`: every config key with its default or value, its kind and its comment."""

import shutil
import textwrap
from collections.abc import Sequence

from grain_jax import config as config_lib
from grain_jax.config import listing
from grain_jax.core import errors, nearest

_WIDEST = 110  # columns


def show(prefix: str, config: str | None, overrides: Sequence[str]) -> str:
    """The keys below `prefix`; of `config`, where one is given, with the values of that.

    Args:
      prefix: a key or a group, "" for all.
      config: as `--config` takes it, or None.
      overrides: `--config.KEY=VALUE`, of that config.

    Raises:
      UserError: there is no such key, or the config cannot be read.
    """
    prefix = prefix.strip(".")
    keys = list(listing.keys())
    shown = [key for key in keys if not prefix or f"{key.name}.".startswith(f"{prefix}.")]
    if not shown and not prefix.startswith("evals."):
        names = [key.name.replace("[]", "") for key in keys]
        groups = {name.rpartition(".")[0] for name in names} - {""}
        raise errors.UserError(
            f"--help-config {prefix}: no such key; {nearest.did_you_mean(prefix, [*groups, *names])}"
        )
    values = _values(config, overrides) if config else {}
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    lines = []
    for key in shown:
        value = _shown(values[key.name]) if key.name in values else key.default
        kind = f"{key.type}, {key.values}" if key.values else key.type
        changed = key.name in values and value != key.default and key.default != "the keys below"
        note = f"; default {key.default}" if changed and key.default else ""
        lines += _entry(f"{key.name} = {value}" if value else key.name, f"({kind}{note})", width)
        lines += textwrap.wrap(
            key.comment, width - 6, initial_indent="    ", subsequent_indent="    "
        )
    of_evals = [
        key for key in values if key.startswith(f"{prefix or 'evals'}.") and "evals." in key
    ]
    lines += [f"{key} = {values[key]!r}" for key in of_evals]
    what = f"of {config}" if config else "with their defaults"
    head = f"{len(shown) + len(of_evals)} config keys {what}; --config.KEY=VALUE sets one."
    return "\n".join([head, "", *lines, ""])


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _entry(name: str, kind: str, width: int) -> list[str]:
    """`name  kind` in a line, or in two where it is too long."""
    if len(name) + 2 + len(kind) <= width:
        return [f"{name}  {kind}"]
    lines = textwrap.wrap(name, width, subsequent_indent="      ", break_long_words=False)
    return lines + textwrap.wrap(kind, width, initial_indent="    ", subsequent_indent="    ")


def _values(config: str, overrides: Sequence[str]) -> dict[str, object]:
    from grain_jax.config import loading  # ml_collections

    return config_lib.flatten(loading.load(config, overrides, resolve=lambda c: c.to_dict()))
