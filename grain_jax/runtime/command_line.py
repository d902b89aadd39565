"""`--config FILE[:arg] --config.a.b=value`: ml_collections' flags, with errors of one line and exit status 2."""

import ast
import contextlib
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from grain_jax import config as config_lib
from grain_jax import errors, named

USAGE_ERROR = errors.UserError.status


def fail(message: object, status: int = USAGE_ERROR) -> NoReturn:
    """Prints the fault (a line each, then their number) on stderr and exits, with status 2 for wrong usage."""
    lines = str(message).strip().splitlines()
    print(*lines, sep="\n", file=sys.stderr)
    if len(lines) > 1:
        print(f"{len(lines)} lines of faults; nothing was run", file=sys.stderr)
    sys.exit(status)


def _keys(config: Any, prefix: str = "") -> list[str]:
    out = []
    for key in config:
        out.append(prefix + key)
        if isinstance(config[key], ConfigDict):
            out += _keys(config[key], f"{prefix}{key}.")
    return out


@contextlib.contextmanager
def running_file(path: str, flag: str) -> Iterator[None]:
    """Runs a Python file of the user inside: it may import files of its folder, and its faults are one line.

    Args:
      path: the file.
      flag: which names it, for the message.

    Raises:
      UserError: whatever goes wrong, with the line of the file.
    """
    if not epath.Path(path).is_file():
        example = "configs/sweeps/learning_rate.py" if flag == "sweep" else "configs/demo.py"
        raise errors.UserError(f"--{flag}: no such file {path}; expected one such as {example}")
    folder = str(epath.Path(path).parent)
    sys.path.insert(0, folder)
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:
        raise errors.UserError(f"--{flag}: {_cause_in(path, error)}") from None
    finally:
        sys.path.remove(folder)


def _cause_in(path: str, error: Exception) -> str:
    """Where in the file the error comes from, and what it is."""
    cause: BaseException | None = error
    while cause is not None:  # ml_collections and absl wrap the file's own error
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.filename == path]
        line = frames[-1].lineno if frames else None
        if isinstance(cause, SyntaxError) and cause.filename == path:
            line = cause.lineno
        if line is not None:
            advice = ""
            if isinstance(cause, ModuleNotFoundError) and str(cause.name).startswith("configs"):
                advice = "; what configs share can be imported from anywhere as grain_jax.recipe"
            return f"{path}:{line}: {type(cause).__name__}: {' '.join(str(cause).split())}{advice}"
        cause = cause.__cause__ or cause.__context__
    # ml_collections' message is the whole traceback: the cause is last.
    return f"{path}: {str(error).strip().splitlines()[-1]}"


def _check_values(argv: list[str], flag_values: flags.FlagValues) -> None:
    """Raises UserError where a flag has no value: absl would take the next flag for it."""
    for argument, following in zip(argv[1:], [*argv[2:], "--"]):
        flag = argument.removeprefix("--")
        if flag == argument or flag not in flag_values or flag_values[flag].boolean:
            continue
        if following.startswith("--"):
            raise errors.UserError(
                f"{argument}: has no value"
                + (f", but the flag {following} after it" if following != "--" else "")
                + f"; expected {argument} VALUE, or {argument}=VALUE where that begins with --"
            )


# Keys that the config file need not have: those of loss terms, and options of one's own tower or data source.
_OPEN = re.compile(r"loss\.terms\.\w+\.\w+|(model\.(image|text)|input)\.options\.\w+")
_UNSET = ("None", "none", "{}")  # values that take an evaluator out, or all of them


def _unset(name: str, overrides: list[str]) -> dict[str, str]:
    """Those of `overrides` that are about a whole evaluator (`evals.NAME`) or all (`evals`): flag -> key.

    Raises:
      UserError: one has another value than None, which is all that a whole evaluator can be set to.
    """
    found = {}
    for flag in overrides:
        key, _, value = flag.removeprefix(f"--{name}.").partition("=")
        if key == "evals" or (key.startswith("evals.") and key.count(".") == 1):
            if value not in _UNSET:
                what = "the evaluators" if key == "evals" else "the evaluator"
                example = "evals.NAME.images" if key == "evals" else f"{key}.images"
                raise errors.UserError(
                    f"--{name}.{key}: got {value!r}, expected None, which takes {what} out, or a key of"
                    f" one, such as --{name}.{example}=FOLDER"
                )
            found[flag] = key
    return found


def _literal(text: str) -> Any:
    """The number, text, list or other literal that a value of the command line is; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False}.get(text, text)


def parse_config(
    argv: list[str],
    holder: flags.FlagHolder,
    flag_values: flags.FlagValues | None = None,
    resolve: Callable[[Any], Any] = config_lib.from_dict,
) -> Any:
    """Parses all flags of `argv` and resolves the config file; wrong usage exits with status 2.

    `total_steps` on the command line wins over the file's `total_epochs`, and the other way round; so do
    the two lengths of the warm-up. `--config.evals.NAME=None` takes an evaluator out, `--config.evals=None` all.
    `--config.loss.terms.NAME.KEY` may be a key that the file has not got.

    Args:
      argv: the program's name, then the flags.
      holder: of the `--config` flag.
      flag_values: where that is defined; absl's by default.
      resolve: makes of the config what is returned; a config.Config by default.
    """
    name = holder.name
    argv = argv[:1] + [re.sub(r"^-(?=\w)", "--", argument) for argument in argv[1:]]
    overrides = [a for a in argv[1:] if a.startswith(f"--{name}.")]
    flag_values = flags.FLAGS if flag_values is None else flag_values
    try:
        _check_values(argv, flag_values)
        rest = [a for a in argv if a not in overrides]
        path = flags.FlagValues()
        flags.DEFINE_string(name, None, "", flag_values=path)
        path(rest, known_only=True)
        given_path = str(path[name].value or "")
        if not given_path:
            raise errors.UserError(f"--{name}: missing; e.g. --{name} configs/demo.py")
        with running_file(given_path.partition(":")[0], name):
            # The file alone first, among flags of its own, to know its keys.
            scratch = flags.FlagValues()
            file = config_flags.DEFINE_config_file(name, None, flag_values=scratch, sys_argv=rest)
            scratch(rest, known_only=True)
            if not hasattr(file.value, "copy_and_resolve_references"):
                raise TypeError(f"get_config() returned {file.value!r}, expected a ConfigDict")
            known = _keys(file.value)
        given = [a.partition("=")[0].removeprefix(f"--{name}.") for a in overrides]
        new = [a for a, key in zip(overrides, given) if key not in known and _OPEN.fullmatch(key)]
        for key in given:
            if key not in known and not _OPEN.fullmatch(key):
                raise errors.UserError(f"--{name}.{key}: {config_lib.unknown_key(key, known)}")
        unset = _unset(name, overrides)
        argv = [argument for argument in argv if argument not in unset and argument not in new]
        if new:  # ml_collections looks for overrides here, not in what it is called with
            vars(flag_values[name])["_sys_argv"] = argv
        left_over = flag_values(argv)[1:]
        if left_over:
            raise errors.UserError(
                f"{left_over[0]}: expected a flag, such as --{name}.batch_size=64"
            )
        config = holder.value.copy_and_resolve_references().unlock()
        for flag in new:
            key, _, value = flag.removeprefix(f"--{name}.").partition("=")
            *groups, option = key.split(".")
            part = config
            for group in groups:
                if part.get(group) is None:
                    part[group] = ConfigDict()
                part = part[group]
            part[option] = _literal(value)
        for pair in config_lib.EITHER_OR:
            for key, other in (pair, pair[::-1]):
                if key in given and other not in given:
                    config.update_from_flattened_dict({other: None})
        for entry in list(config.get("evals", ())):
            if {"evals", f"evals.{entry}"} & set(unset.values()):
                del config.evals[entry]
        with named.importing():  # the classes that the config of the user names
            return resolve(config)
    except errors.UserError as error:
        fail(error)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        fail(" ".join(str(error).split()))


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
        with errors.out_of_memory_in_a_line(sys.argv[0].rpartition("/")[2]):
            status = run(sys.argv)
        sys.exit(status or 0)
    except errors.UserError as error:
        fail(error, error.status)
