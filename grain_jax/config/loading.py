"""`--config FILE[:ARG]` or `NAME[:ARG]`: which file is meant, and its config with the overrides of the command line.

ml_collections loads the file and parses the overrides by the types of their keys; errors are one line.
"""

import ast
import contextlib
import importlib.util
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from grain_jax import config as config_lib
from grain_jax.config.evals import same_place
from grain_jax.core import errors, named, nearest

_PACKAGE = "grain_jax.configs"
# Keys that the config file need not have: those of loss terms, and options of one's own tower or data source.
_OPEN = re.compile(r"loss\.terms\.\w+\.\w+|(model\.(image|text)|input)\.options\.\w+")
_UNSET = ("None", "none", "{}")  # values that take an evaluator out, or all of them


def load(
    given: str | None,
    overrides: Sequence[str] = (),
    resolve: Callable[[Any], Any] = config_lib.from_dict,
) -> Any:
    """The config of a file, with overrides.

    `total_steps` of the overrides wins over the file's `total_epochs`, and the other way round; so do the two lengths
    of the warm-up; None leaves that one unset. `--config.evals.NAME=None` takes an evaluator out, `--config.evals=None`
    all.
    `--config.evals.NAME.KEY` sets `missing` of that entry to "error", where it is not set there too.
    `--config.loss.terms.NAME.KEY` may be a key that the file has not got.

    Args:
      given: as `--config` takes it; None: it was not given.
      overrides: `--config.KEY=VALUE`.
      resolve: makes of the config what is returned; a config.Config by default.

    Raises:
      UserError: no such file or key, a fault in the file, or a value of another type; a line a fault.
    """
    if not given:
        raise errors.UserError("--config: missing; e.g. --config demo, or a file of your own")
    path, argument = find(given, "config")
    words = ["grain-jax", f"--config={path}{argument}"]
    pairs = [word.removeprefix("--config.").partition("=") for word in overrides]
    texts = {key: text for key, _, text in pairs}
    whole = {key for key in texts if re.fullmatch(r"evals(\.[^.]*)?", key)}
    try:
        with running_file(path, "config"):
            # The file alone first, to know its keys.
            file = _parse(words).value
            if not hasattr(file, "copy_and_resolve_references"):
                raise TypeError(f"get_config() returned {file!r}, expected a ConfigDict")
            known = _keys(file)
        for key in texts:
            if key not in known and not _OPEN.fullmatch(key):
                raise errors.UserError(f"--config.{key}: {config_lib.unknown_key(key, known)}")
        _check_unset({key: texts[key] for key in whole})
        plain = [
            word
            for word, (key, _, text) in zip(overrides, pairs)
            if key in known and key not in whole and not _unsets(key, text)
        ]
        config = _parse([*words, *plain]).value.copy_and_resolve_references().unlock()
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, errors.UserError):
            raise
        raise errors.UserError(" ".join(str(error).split())) from None
    for key in (key for key, text in texts.items() if key not in known or _unsets(key, text)):
        *groups, option = key.split(".")
        part = config
        for group in groups:
            if not isinstance(part.get(group), ConfigDict):
                _put(part, group, ConfigDict())
            part = part[group]
        _put(part, option, _literal(texts[key]))
    for key in texts:  # what the command line asks for may not be skipped
        group, name, option = (*key.split(".", 2), "", "")[:3]
        asked = group == "evals" and option not in ("", "missing")
        if asked and f"evals.{name}.missing" not in texts and "missing" in config.evals[name]:
            config.evals[name].missing = "error"
    for pair in config_lib.EITHER_OR:
        for key, other in (pair, pair[::-1]):
            if texts.get(key, "None") != "None" and other not in texts:
                config.update_from_flattened_dict({other: None})
    for entry in list(config.get("evals", ())):
        if {"evals", f"evals.{entry}"} & whole:
            del config.evals[entry]
    with named.importing():  # the classes that the config of the user names
        return resolve(config)


def _put(group: ConfigDict, key: str, value: Any) -> None:
    """Sets a key to a value of any type."""
    if key in group:
        del group[key]
    group[key] = value


def _unsets(key: str, text: str) -> bool:
    """Whether it leaves one of a pair unset, which may be a number in the file."""
    return text == "None" and key in itertools.chain(*config_lib.EITHER_OR)


def _parse(words: list[str]) -> flags.FlagHolder:
    """ml_collections' flag after it parsed the words, the first of which is the program's name."""
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=words)
    values(words)
    return holder


def _keys(config: Any, prefix: str = "") -> list[str]:
    out = []
    for key in config:
        out.append(prefix + key)
        if isinstance(config[key], ConfigDict):
            out += _keys(config[key], f"{prefix}{key}.")
    return out


def _check_unset(whole: Mapping[str, str]) -> None:
    """Raises UserError where a whole evaluator (`evals.NAME`), or all (`evals`), are set to another value than None."""
    for key, value in whole.items():
        if value not in _UNSET:
            of_one = f"{key}.NAME" if key == "evals" else key
            raise errors.UserError(
                f"--config.{key}: got {value!r}, expected None, which takes the"
                f" evaluator{'s' * (key == 'evals')} out, or a key of one, such as --config.{of_one}.images=FOLDER"
            )


def _literal(text: str) -> Any:
    """The number, text, list or other literal that a value of the command line is; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False}.get(text, text)


def find(given: str, flag: str) -> tuple[str, str]:
    """The file that `--config` or `--sweep` names, and what follows it from a colon on.

    A file that exists is itself. Otherwise NAME, configs/X.py and, for --sweep, sweeps/NAME are files of the
    package; a line on stderr says so where another reading was possible.

    Args:
      given: FILE[:ARG] or NAME[:ARG].
      flag: "config" or "sweep", for messages.

    Raises:
      UserError: neither is there; the line has the nearest name of the package, or all.
    """
    name, colon, argument = given.partition(":")
    if "://" in given:  # a remote file, whose name has a colon
        scheme, _, rest = given.partition("://")
        name, colon, argument = rest.partition(":")
        name = f"{scheme}://{name}"
    if epath.Path(name).is_file():
        return name, colon + argument
    shipped = packaged(flag)
    stem = name.removesuffix(".py")
    for folder in ("configs/", "sweeps/") if flag == "sweep" else ("configs/",):
        stem = stem.removeprefix(folder)
    if stem not in shipped:
        raise errors.UserError(
            f"--{flag}: no such file {name}, and no {flag} of the package has that name;"
            f" {nearest.did_you_mean(stem, shipped)}"
        )
    written = epath.Path(name) if name.endswith(".py") else epath.Path(f"{name}.py")
    here = (written, epath.Path(f"configs/{stem}.py"))
    beside = [p for p in here if p.is_file() and not same_place(str(p), str(shipped[stem]))]
    if beside or (len(written.parts) > 1 and written.parent.is_dir()):
        rather = f"; the file {beside[0]} is named by its whole path" if beside else ""
        print(f"--{flag} {given}: taken from the package, {shipped[stem]}{rather}", file=sys.stderr)
    return str(shipped[stem]), colon + argument


def packaged(flag: str = "config") -> dict[str, epath.Path]:
    """Name -> file of the configs (or, for "sweep", of the sweeps) of the package."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        return {}
    folder = epath.Path(list(found.submodule_search_locations)[0])
    folder = folder / "sweeps" if flag == "sweep" else folder
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
        # ml_collections runs every file in one module, where the names of the file before still stand.
        sys.modules.pop(f"{flag}_config", None)


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
                advice = (
                    "; what configs share can be imported from anywhere as grain_jax.config.recipe"
                )
            return f"{path}:{line}: {type(cause).__name__}: {' '.join(str(cause).split())}{advice}"
        cause = cause.__cause__ or cause.__context__
    # ml_collections' message is the whole traceback: the cause is last.
    return f"{path}: {str(error).strip().splitlines()[-1]}"
