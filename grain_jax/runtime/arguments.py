"""The argument parser of the commands that take no config; it needs neither JAX nor absl."""

import argparse
from typing import Any, NoReturn

from grain_jax import errors


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations, keeps the lines of its description, and raises.

    Raises:
      UserError: wrong usage, in one line; the command exits with its status, 2.
    """

    def __init__(self, prog: str | None = None, **options: Any):
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, **options)

    def error(self, message: str) -> NoReturn:
        """Called by argparse where the arguments are wrong."""
        raise errors.UserError(f"{self.prog}: {message}; --help lists the arguments")
