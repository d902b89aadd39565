"""`--config FILE[:arg] --config.a.b=value`: ml_collections' flags, with errors of one line and exit status 2."""

import logging
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from grain_jax import config as config_lib
from grain_jax import errors

USAGE_ERROR = errors.UserError.status


def fail(message: object, status: int = USAGE_ERROR) -> None:
    """Prints the fault (a line each, then their number) on stderr and exits, with status 2 for wrong usage."""
    lines = str(message).strip().splitlines()
    print(*lines, sep="\n", file=sys.stderr)
    if len(lines) > 1:
        print(f"{len(lines)} lines of faults; nothing was run", file=sys.stderr)
    sys.exit(status)


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    out = []
    for key in config:
        out.append(prefix + key)
        if isinstance(config[key], ConfigDict):
            out += _keys(config[key], f"{prefix}{key}.")
    return out


# Pairs of which exactly one is set: the one that the command line sets wins over the file's other.
_EITHER_OR = (("total_steps", "total_epochs"), ("optim.warmup_steps", "optim.warmup_epochs"))


def parse_config(
    argv: list[str],
    holder: flags.FlagHolder,
    flag_values: flags.FlagValues | None = None,
    resolve: Callable[[ConfigDict], Any] = config_lib.from_dict,
) -> Any:
    """Parses all flags of `argv` and resolves the config file; wrong usage exits with status 2.

    `total_steps` on the command line wins over the file's `total_epochs`, and the other way round; so do
    the two lengths of the warm-up.

    Args:
      argv: the program's name, then the flags.
      holder: of the `--config` flag.
      flag_values: where that is defined; absl's by default.
      resolve: makes of the config what is returned; a config.Config by default.
    """
    name = holder.name
    argv = argv[:1] + [re.sub(r"^-(?=\w)", "--", argument) for argument in argv[1:]]
    overrides = [a for a in argv[1:] if a.startswith(f"--{name}.")]
    try:
        # The file alone first, among flags of its own, to know its keys.
        scratch = flags.FlagValues()
        rest = [a for a in argv if a not in overrides]
        file = config_flags.DEFINE_config_file(name, None, flag_values=scratch, sys_argv=rest)
        try:
            scratch(rest, known_only=True)
            known = _keys(file.value) if file.value is not None else None
        except OSError:  # ml_collections' message has four lines and no advice
            raise errors.UserError(
                f"--{name}: no such file; expected one such as configs/demo.py"
            ) from None
        if known is None:
            raise errors.UserError(f"--{name}: missing; e.g. --{name} configs/demo.py")
        given = [a.partition("=")[0].removeprefix(f"--{name}.") for a in overrides]
        for key in given:
            if key not in known:
                raise errors.UserError(f"--{name}.{key}: {config_lib.unknown_key(key, known)}")
        left_over = (flags.FLAGS if flag_values is None else flag_values)(argv)[1:]
        if left_over:
            raise errors.UserError(
                f"{left_over[0]}: expected a flag, such as --{name}.batch_size=64"
            )
        config = holder.value.copy_and_resolve_references().unlock()
        for pair in _EITHER_OR:
            for key, other in (pair, pair[::-1]):
                if key in given and other not in given:
                    config.update_from_flattened_dict({other: None})
        return resolve(config)
    except errors.UserError as error:
        fail(error)
    except (flags.Error, AttributeError, KeyError, TypeError, SyntaxError, ValueError) as error:
        # Where a config file fails, ml_collections' message is its whole traceback: the cause is last.
        text = str(error).strip()
        fail(
            f"--{name}: {text.splitlines()[-1]}" if "Traceback" in text else " ".join(text.split())
        )


def show_help(argv: list[str], about: str) -> None:
    """Prints `about` and exits with status 0 where help is asked for."""
    if {"-h", "--help"} & set(argv[1:]):
        print(about.strip())
        sys.exit(0)


def define_config() -> flags.FlagHolder:
    """The `--config` flag."""
    return config_flags.DEFINE_config_file("config", None, "config file, e.g. configs/demo.py")


def main(run: Callable[[list[str]], int | None]) -> None:
    """Runs a command; faults of the user's input become their lines and status 2."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        sys.exit(run(sys.argv) or 0)
    except errors.UserError as error:
        fail(error, error.status)
