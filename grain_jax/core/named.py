"""Finds an extension by its name: one in the package's table, or `module:Name` in any module of Python.

Loss terms, evaluators, towers and data sources are chosen this way. Imports nothing heavy.

A stored config (of a checkpoint, a workdir) may come from anyone, so a name in it imports no code. Its module
must be the user's own and imported already, or the environment variable GRAIN_JAX_IMPORT must list it
(separated by commas). Modules of Python and of installed packages are not the user's own: a stored `os:abort`
finds nothing. Commands switch imports on (`importing`) for the config that their user passes.
"""

import contextlib
import contextvars
import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grain_jax.core import errors, nearest

VARIABLE = "GRAIN_JAX_IMPORT"
_importing = contextvars.ContextVar("importing", default=False)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Inside, names may import their modules."""
    token = _importing.set(True)
    try:
        yield
    finally:
        _importing.reset(token)


def is_external(name: str) -> bool:
    """Whether a name is `module:Name`, not one of the package."""
    return ":" in name


def may_import(name: str) -> bool:
    """Whether `find` may look into the module of `module:Name`; True of a built-in name."""
    module_name = name.partition(":")[0]
    listed = [module.strip() for module in os.environ.get(VARIABLE, "").split(",")]
    ours = not is_external(name) or _is_of_package(module_name)
    return ours or _importing.get() or module_name in listed or _is_users_own(module_name)


def _is_of_package(module_name: str) -> bool:
    """Whether a module is one of this package."""
    top, _, rest = module_name.partition(".")
    room, folder = rest.partition(".")[0], Path(__file__).parent.parent
    inside = not room or (folder / room).is_dir() or (folder / f"{room}.py").is_file()
    return top == "grain_jax" and inside


def _is_users_own(module_name: str) -> bool:
    """Whether a module is imported already, and neither of Python nor of an installed package."""
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if file is None:
        return False
    of_python = [sysconfig.get_path(key) + "/" for key in ("stdlib", "platstdlib")]
    installed = any(f"/{folder}/" in file for folder in ("site-packages", "dist-packages"))
    return not installed and not file.startswith(tuple(of_python))


def find(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """The value of `name` in `table`, or the attribute of a module that `module:Name` names.

    Args:
      kind: what is looked for, as an error says it, e.g. "data source".
      name: a key of `table`, or `module:Name`.
      table: the package's own, by name.

    Raises:
      errors.UserError: there is no such name, module or attribute (the line lists what there is), or the
        module may not be imported.
    """
    if name in table:
        return table[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        near = nearest.find(name, table)
        meant = f"did you mean {near}? " if near else ""
        known = ", ".join(sorted(table))
        raise errors.UserError(
            f"{kind} {name!r}: {meant}expected one of: {known}; or module:Name of your own"
        )
    if not may_import(name):
        raise errors.UserError(
            f"{kind} {name!r}: a stored config imports no code; if you trust it, import {module_name} first,"
            f" or set {VARIABLE}={module_name}"
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the code of the module raises
        reason = f"{module_name!r} cannot be imported ({_cause(error)})"
        raise errors.UserError(
            f"{kind} {name!r}: {reason}; expected module:Name of a module on Python's path"
        ) from error
    if not hasattr(module, attribute):
        of = lambda value: getattr(value, "__module__", None)
        known = [x for x, value in vars(module).items() if of(value) == module_name and x[0] != "_"]
        raise errors.UserError(
            f"{kind} {name!r}: {module_name} has no {attribute!r}, expected one of:"
            f" {', '.join(known) or 'nothing is defined there'}"
        )
    return getattr(module, attribute)


def _cause(error: BaseException) -> str:
    """The error in a line; with its type and its line of code if it is not an error of the import itself."""
    text = " ".join(str(error).split())
    if isinstance(error, (ImportError, ValueError, SyntaxError)):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}: {type(error).__name__}: {text}"
