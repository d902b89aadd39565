"""The commands of `grain-jax`: where the declaration and the main function of each are.

`parsers` gives the parser of every command, for the documentation and the tests; `main` is the command itself. A
command's arguments are parsed before its module is imported: help and wrong usage need nothing heavy.
"""

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any

from grain_jax import __version__
from grain_jax.cli import process
from grain_jax.cli.parser import Command, Parser
from grain_jax.core import nearest

# Name -> (the class that declares it, its main function: (arguments) -> exit status, or None for 0).
COMMANDS = {
    "train": ("grain_jax.train.arguments:Train", "grain_jax.train.run:console"),
    "evaluate": ("grain_jax.evaluate.arguments:Evaluate", "grain_jax.evaluate.__main__:main"),
    "embed": ("grain_jax.data.embed.arguments:Embed", "grain_jax.data.embed.__main__:main"),
    "build": ("grain_jax.data.arguments:Build", "grain_jax.data.build:main"),
    "annotate": (
        "grain_jax.data.annotate.arguments:Annotate",
        "grain_jax.data.annotate.__main__:main",
    ),
    "inspect": ("grain_jax.data.inspect.arguments:Inspect", "grain_jax.data.inspect.__main__:main"),
    "convert": ("grain_jax.convert.arguments:Convert", "grain_jax.convert.__main__:main"),
    "export": ("grain_jax.convert.arguments:Export", "grain_jax.convert.export:main"),
    "report": (
        "grain_jax.evaluate.report.arguments:Report",
        "grain_jax.evaluate.report.__main__:main",
    ),
    "demo": ("grain_jax.demo.arguments:Demo", "grain_jax.demo.__main__:main"),
    "plan": ("grain_jax.launch.arguments:Plan", "grain_jax.launch.plan:main"),
    "sweep": ("grain_jax.launch.arguments:Sweep", "grain_jax.launch.sweep:main"),
    "local": ("grain_jax.launch.arguments:Local", "grain_jax.launch.local:main"),
    "launch-files": ("grain_jax.launch.arguments:LaunchFiles", "grain_jax.launch.files:main"),
    "aviary": ("grain_jax.data.aviary.arguments:Aviary", "grain_jax.data.aviary.__main__:main"),
}


def declared(name: str) -> type[Command]:
    """The class that declares a command."""
    return _at(COMMANDS[name][0])


def parsers() -> dict[str, Parser]:
    """The parser of each command, and of each kind of a command: "train", ..., "evaluate", "evaluate zeroshot", ...

    `Parser.about`, `more`, `example` and `groups` are what a page about a command needs. Imports neither JAX, numpy,
    TensorFlow nor PyTorch.
    """
    found: dict[str, Parser] = {}
    for name in COMMANDS:
        found[name] = Parser(declared(name))
        found |= {f"{name} {kind}": parser for kind, parser in found[name].kinds.items()}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """`grain-jax SUB ...`; exits with the command's status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:  # the folder that it is started in
        sys.path.append("")  # last: `module:Name` of a user is found, and hides nothing
    process.run(lambda given: _main(given or []), words)


def _main(words: Sequence[str]) -> int | None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if words else process.USAGE_ERROR
    if words[0] in ("--version", "-V", "version"):
        print(version())
        return 0
    name, *rest = words
    if name not in COMMANDS:
        known = [*COMMANDS, "--help", "--version"]
        process.fail(f"grain-jax {name}: no such command; {nearest.did_you_mean(name, known)}")
    declared(name).parse(rest)
    process.check_limits()
    return _at(COMMANDS[name][1])(rest)


def help_text() -> str:
    """What `grain-jax --help` prints."""
    lines = "\n".join(f"  {name:14}{declared(name).about()}" for name in COMMANDS)
    return f"""usage: grain-jax COMMAND [--flags]

GRAIN: vision-language pretraining that grounds descriptions in images, in JAX.

{lines}

  grain-jax COMMAND --help   the command's flags, with an example
  grain-jax --version        this package, Python, JAX and what else runs

Example:
  grain-jax train --config demo --workdir runs/demo"""


def version() -> str:
    """This package, Python, and the installed packages that results depend on; a line each."""
    lines = [f"grain_jax {__version__}", f"Python {sys.version.split()[0]}"]
    shown = [("JAX", "jax"), ("Flax", "flax"), ("numpy", "numpy")]
    shown += [("TensorFlow", "tensorflow"), ("TensorFlow", "tensorflow-cpu")]
    for name, distribution in shown:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{name} {importlib.metadata.version(distribution)}")
    return "\n".join(lines)


def _at(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
