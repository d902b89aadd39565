"""The error that every conversion raises."""

import contextlib
from collections.abc import Iterator, Sequence

from grain_jax.core import errors


class ConvertError(errors.UserError):
    """A checkpoint cannot be converted; the message has one line a fault."""


@contextlib.contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Puts `where` before each line of a UserError raised inside, which becomes a ConvertError."""
    try:
        yield
    except errors.UserError as error:
        lines = str(error).split("\n")
        raise ConvertError("\n".join(where + line for line in lines)) from error


def raise_any(faults: Sequence[str]) -> None:
    """Raises ConvertError with one line per fault, if there are any."""
    if faults:
        raise ConvertError("\n".join(faults))


@contextlib.contextmanager
def needing(package: str, where: object, extra: str = "interop") -> Iterator[None]:
    """Inside, an ImportError is a ConvertError of one line: `where` needs the package, which `extra` has."""
    try:
        yield
    except ImportError:
        line = f"{where}: the package {package} is missing; pip install 'grain_jax[{extra}]'"
        raise ConvertError(line) from None
