"""`--config FILE[:ARG]` or `NAME[:ARG]`: which file is meant, and its config with the overrides.

ml_collections loads the file and parses the overrides by the types of their keys. Errors are one line.
"""

import ast
import contextlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from grain_jax import config as config_lib
from grain_jax.config import keys, parse
from grain_jax.core import errors, named, nearest

_CONFIGS = epath.Path(__file__).parent.parent / "configs"
# Keys that the config file need not have: options of loss terms, towers and data sources of the user.
_OPEN = re.compile(r"loss\.terms\.\w+\.\w+|(model\.(image|text)|input)\.options\.\w+")
_EVALUATORS = re.compile(r"evals(\.[^.]*)?")  # one of them, or all
_PAIRS = {key: other for pair in config_lib.EITHER_OR for key, other in (pair, pair[::-1])}


def load(
    file: str | None, overrides: Sequence[str] = (), resolve: Callable[[Any], Any] = config_lib.from_dict
) -> Any:
    """The config of a file, with overrides.

    - `total_steps` of the overrides wins over `total_epochs` of the file, and the other way round; so do the
      two lengths of the warm-up. None leaves the key unset.
    - `--config.evals.NAME=None` removes an evaluator, `--config.evals=None` all. `--config.evals.NAME.KEY`
      also sets `missing` of that entry to "error", since it was asked for.
    - `--config.loss.terms.NAME.KEY` may be a key that the file does not have.

    Args:
      file: as `--config` takes it; None if it was missing.
      overrides: `--config.KEY=VALUE`.
      resolve: makes the result from the ConfigDict; a config.Config by default.

    Raises:
      UserError: no such file or key, a fault in the file, or a value of another type; a line for each fault.
    """
    if not file:
        raise errors.UserError("--config: missing; e.g. --config demo, or a file of your own")
    path, argument = find(file, "config")
    arguments = ["grain-jax", f"--config={path}{argument}"]
    texts: dict[str, str] = {}
    plain = []  # overrides that ml_collections parses
    try:
        with running_file(path, "config"):
            read = _parse(arguments)  # the file alone, to know its keys
            if not isinstance(read, ConfigDict):
                raise TypeError(f"get_config() returned {read!r}, expected a ConfigDict")
            known = _keys(read)
        for word in overrides:
            key, _, text = word.removeprefix("--config.").partition("=")
            texts[key] = text
            if key not in known and not _OPEN.fullmatch(key):
                raise errors.UserError(f"--config.{key}: {config_lib.unknown_key(key, known)}")
            if _EVALUATORS.fullmatch(key):
                if text != "None":
                    fault = f"got {text!r}, expected None, which removes it"
                    raise errors.UserError(f"--config.{key}: {fault}")
            elif key in known and not (key in _PAIRS and text == "None"):
                plain.append(word)
        config = _parse([*arguments, *plain]).copy_and_resolve_references().unlock()
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, errors.UserError):
            raise
        raise errors.UserError(_reason(error, texts)) from None
    for key, text in texts.items():
        if _EVALUATORS.fullmatch(key):
            group, _, name = key.partition(".")
            for entry in [name] if name else list(config[group]):
                del config[group][entry]
        elif _OPEN.fullmatch(key) and key not in known:
            _put(config, key, _literal(text))
        elif key in _PAIRS and text == "None":
            _put(config, key, None)
    for key, text in texts.items():
        if key in _PAIRS and text != "None" and _PAIRS[key] not in texts:
            _put(config, _PAIRS[key], None)
        parts = key.split(".")
        if parts[0] == "evals" and len(parts) > 2 and parts[2] != "missing":
            entry = config.evals.get(parts[1], {})
            if f"evals.{parts[1]}.missing" not in texts and "missing" in entry:
                entry.missing = "error"
    with named.importing():  # the classes that the user's config names
        return resolve(config)


def _reason(error: Exception, texts: dict[str, str]) -> str:
    """What ml_collections says in a line; for a value of another type, what its key expects."""
    said = " ".join(str(error).split())
    for name, key, *_ in keys.listed(config_lib.Config):
        if said.startswith(f"flag --config.{name}={texts.get(name)}: "):
            return f"--config.{name}: got {texts[name]!r}, expected {parse.expected(key)}"
    return said


def _parse(arguments: list[str]) -> Any:
    """The value of ml_collections' flag for these words; the first one is the program's name."""
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=arguments)
    values(arguments)
    return holder.value


def _keys(config: Any, prefix: str = "") -> list[str]:
    names = []
    for key in config:
        names.append(prefix + key)
        if isinstance(config[key], ConfigDict):
            names += _keys(config[key], f"{prefix}{key}.")
    return names


def _put(config: Any, key: str, value: Any) -> None:
    """Sets a key to a value of any type; makes the groups that it is in."""
    *groups, name = key.split(".")
    for group in groups:
        if not isinstance(config.get(group), ConfigDict):
            _put(config, group, ConfigDict())
        config = config[group]
    if name in config:
        del config[name]
    config[name] = value


def _literal(text: str) -> Any:
    """The Python literal that a value of the command line is; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False}.get(text, text)


def find(text: str, flag: str) -> tuple[str, str]:
    """The file that `--config` or `--sweep` names, and what follows it from a colon on.

    A file wins. Else it is a name of the package.

    Args:
      text: FILE[:ARG] or NAME[:ARG].
      flag: "config" or "sweep".

    Raises:
      UserError: neither exists; the line has the nearest name of the package, or all.
    """
    scheme, name, argument = re.findall(r"^(\w+://)?([^:]*)(.*)$", text, re.DOTALL)[0]
    name = scheme + name
    if epath.Path(name).is_file():
        return name, argument
    shipped = packaged(flag)
    stem = re.sub(r"^(configs/)?(sweeps/)?" if flag == "sweep" else "^configs/", "", name)
    stem = stem.removesuffix(".py")
    if stem not in shipped:
        raise errors.UserError(
            f"--{flag}: no such file {name}, and no {flag} of the package has that name;"
            f" {nearest.did_you_mean(stem, shipped)}"
        )
    return str(shipped[stem]), argument


def packaged(flag: str = "config") -> dict[str, epath.Path]:
    """Name -> file of the configs (or, for "sweep", of the sweeps) of the package."""
    folder = _CONFIGS / "sweeps" if flag == "sweep" else _CONFIGS
    files = sorted(folder.glob("*.py"), key=lambda path: path.stem)
    return {path.stem: path for path in files if path.stem != "__init__"}


@contextlib.contextmanager
def running_file(path: str, flag: str) -> Iterator[None]:
    """Runs a Python file of the user inside: it may import files of its folder, and its faults are one line.

    Args:
      path: the file.
      flag: which names it, for the message.

    Raises:
      UserError: whatever goes wrong, with the line of the file.
    """
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
        # ml_collections runs every file in one module, which still has the names of the file before.
        sys.modules.pop(f"{flag}_config", None)


def _cause_in(path: str, error: Exception) -> str:
    """The line of the file that the error comes from, and what it is."""
    cause: BaseException | None = error
    while cause is not None:  # ml_collections and absl wrap the error of the file
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.filename == path]
        line = frames[-1].lineno if frames else None
        if isinstance(cause, SyntaxError) and cause.filename == path:
            line = cause.lineno
        if line is not None:
            return f"{path}:{line}: {type(cause).__name__}: {' '.join(str(cause).split())}"
        cause = cause.__cause__ or cause.__context__
    # The message of ml_collections is the whole traceback: the cause is last.
    return f"{path}: {str(error).strip().splitlines()[-1]}"
