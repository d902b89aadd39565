"""Runs a command of a table (`grain_jax.__main__.COMMANDS`), and gives the parsers of all its commands.

Arguments are parsed before the module of the command is imported: help and wrong usage need nothing heavy.
"""

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from grain_jax.cli import process
from grain_jax.cli.parser import Command, Parser
from grain_jax.core import nearest
from grain_jax.core.version import __version__

# Name -> (the class that declares the command, its main function), both as `module:Name` below grain_jax.
Table = Mapping[str, tuple[str, str]]


def declared(table: Table, name: str) -> type[Command]:
    """The class that declares a command."""
    return _import(table[name][0])


def parsers(table: Table) -> dict[str, Parser]:
    """The parser of each command and kind: "train", ..., "evaluate", "evaluate zeroshot", ..."""
    by_name: dict[str, Parser] = {}
    for name in table:
        by_name[name] = Parser(declared(table, name))
        by_name |= {f"{name} {kind}": parser for kind, parser in by_name[name].kinds.items()}
    return by_name


def run(table: Table, arguments: Sequence[str] | None = None) -> None:
    """Runs `grain-jax COMMAND ...`; exits with the status of the command."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:  # the folder that the command is started in
        sys.path.append("")  # last: `module:Name` of a user is found, and hides nothing
    process.run(lambda line: _run(table, line or []), line)


def _run(table: Table, line: Sequence[str]) -> int | None:
    if not line or line[0] in ("-h", "--help", "help"):
        print(help_text(table))
        return 0 if line else process.USAGE_ERROR
    if line[0] in ("--version", "-V", "version"):
        print(version())
        return 0
    name, *rest = line
    if name not in table:
        known = [*table, "--help", "--version"]
        process.fail(f"grain-jax {name}: no such command; {nearest.did_you_mean(name, known)}")
    declared(table, name).parse(rest)
    return _import(table[name][1])(rest)


def help_text(table: Table) -> str:
    """What `grain-jax --help` prints."""
    lines = "\n".join(f"  {name:14}{declared(table, name).about()}" for name in table)
    return f"""usage: grain-jax COMMAND [--flags]

GRAIN in JAX: CLIP-style pretraining that also aligns image regions with descriptions.

{lines}

  grain-jax COMMAND --help   the flags of the command, with an example
  grain-jax --version        the versions of this package, Python, JAX and other packages

Example:
  grain-jax train --config demo --workdir runs/demo"""


def version() -> str:
    """This package, Python, and the installed packages that results depend on; a line each."""
    lines = [f"grain_jax {__version__}", f"Python {sys.version.split()[0]}"]
    for name in ("jax", "flax", "numpy", "tensorflow", "tensorflow-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{name} {importlib.metadata.version(name)}")
    return "\n".join(lines)


def _import(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(f"grain_jax.{module}"), name)
