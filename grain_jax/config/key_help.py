"""The text of `--help-config`: each config key with its value, its type and its help."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from grain_jax.config import loading
from grain_jax.config.fields import Config
from grain_jax.config.keys import flatten, listed
from grain_jax.core import errors, nearest

_WIDEST = 110  # columns
_BELOW: Any = dict(initial_indent="    ", subsequent_indent="    ", break_long_words=False)


def show(prefix: str, config: str | None, overrides: Sequence[str]) -> str:
    """The keys below a prefix.

    Args:
      prefix: a key or a group; "" for all.
      config: as `--config` takes it, for its values; None for the defaults.
      overrides: `--config.KEY=VALUE` of that config.

    Raises:
      UserError: there is no such key, or the config cannot be read.
    """
    prefix = prefix.strip(".")
    items = list(listed(Config))
    shown = [item for item in items if not prefix or f"{item.name}.".startswith(f"{prefix}.")]
    if not shown and not prefix.startswith("evals."):
        names = [item.name.replace("[]", "") for item in items]
        groups = {name.rpartition(".")[0] for name in names} - {""}
        near = nearest.did_you_mean(prefix, [*groups, *names])
        raise errors.UserError(f"--help-config {prefix}: no such key; {near}")
    values = {}
    if config:
        values = flatten(loading.load(config, overrides, resolve=lambda c: c.to_dict()))
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    lines = []
    for name, key, _, _ in shown:
        value, default = key.default_words, key.default_words
        if name in values:
            value = f"{values[name]:.6g}" if isinstance(values[name], float) else repr(values[name])
        facts = [key.type_words, key.values_words]
        facts += (
            [f"default {default}"]
            if value != default and default not in ("", "the keys below")
            else []
        )
        line = f"{name} = {value}" if value else name
        facts_line = f"({', '.join(filter(None, facts))})"
        if len(line) + 2 + len(facts_line) <= width:
            lines.append(f"{line}  {facts_line}")
        else:
            lines += textwrap.wrap(line, width, subsequent_indent="      ", break_long_words=False)
            lines += textwrap.wrap(facts_line, width, **_BELOW)
        lines += textwrap.wrap(key.declared["help"], width, **_BELOW)
    evals = [
        name for name in values if name.startswith(f"{prefix or 'evals'}.") and "evals." in name
    ]
    lines += [f"{name} = {values[name]!r}" for name in evals]
    source = f"of {config}" if config else "with their defaults"
    head = f"{len(shown) + len(evals)} config keys {source}; --config.KEY=VALUE sets one."
    return "\n".join([head, "", *lines, ""])
