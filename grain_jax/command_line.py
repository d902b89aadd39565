"""`--config FILE[:arg] --config.a.b=value`: ml_collections' flags, with errors of one line and exit status 2."""

import logging
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import ConfigDict, config_flags

from grain_jax import config as config_lib

USAGE_ERROR = 2

# What of a run may go wrong by the user's hand: these are printed as they are, without a traceback.
INPUT_FAULTS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)


def fail(message: object) -> None:
    """Prints the fault (a line each) on stderr and exits with status 2."""
    print(str(message).strip(), file=sys.stderr)
    sys.exit(USAGE_ERROR)


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    out = []
    for key in config:
        out.append(prefix + key)
        if isinstance(config[key], ConfigDict):
            out += _keys(config[key], f"{prefix}{key}.")
    return out


def parse_config(argv: list[str], holder: flags.FlagHolder) -> config_lib.Config:
    """Parses all flags of `argv` and resolves the config file; wrong usage exits with status 2.

    `total_steps` on the command line wins over the file's `total_epochs`, and the other way round.
    """
    name = holder.name
    overrides = [a for a in argv[1:] if a.startswith(f"--{name}.")]
    try:
        # The file alone first, among flags of its own, to know its keys.
        scratch = flags.FlagValues()
        rest = [a for a in argv if a not in overrides]
        file = config_flags.DEFINE_config_file(name, None, flag_values=scratch, sys_argv=rest)
        try:
            scratch(rest, known_only=True)
        except OSError:  # ml_collections' message has four lines and no advice
            raise ValueError(
                f"--{name}: no such file; expected one such as configs/demo.py"
            ) from None
        if file.value is None:
            raise ValueError(f"--{name}: missing; e.g. --{name} configs/demo.py")
        known = _keys(file.value)
        for argument in overrides:
            key = argument.partition("=")[0].removeprefix(f"--{name}.")
            if key not in known:
                raise ValueError(f"--{name}.{key}: {config_lib.unknown_key(key, known)}")
        flags.FLAGS(argv)
        config = holder.value.to_dict()
        given = {a.partition("=")[0].removeprefix(f"--{name}.") for a in overrides}
        for key, other in (("total_steps", "total_epochs"), ("total_epochs", "total_steps")):
            if key in given and other not in given:
                config[other] = None
        return config_lib.from_dict(config)
    except config_lib.ConfigError as error:
        fail(error)
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        SyntaxError,
        OSError,
        ValueError,
    ) as error:
        fail(" ".join(str(error).split()))


def define_config() -> flags.FlagHolder:
    """The `--config` flag."""
    return config_flags.DEFINE_config_file("config", None, "config file, e.g. configs/demo.py")


def main(run: Callable[[list[str]], int | None]) -> None:
    """Runs a command; faults of the user's input become their line and status 2."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        sys.exit(run(sys.argv) or 0)
    except INPUT_FAULTS as error:
        if type(error) in (
            ValueError,
        ):  # a plain ValueError is ours to debug, not the user's to read
            raise
        fail(error)
