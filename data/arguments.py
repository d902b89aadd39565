"""Shared by the commands of this folder: the parser, which reports wrong usage in one line, and types of arguments."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from grain_jax import errors
from grain_jax.runtime import arguments


class Parser(arguments.Parser):
    """Wrong usage is one line and status 2, at once: the commands parse before they catch faults."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        try:
            super().error(message)
        except errors.UserError as error:
            self.exit(error.status, f"{error}\n")


def positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")


def share(text: str) -> float:
    """An argument that is a share, from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value <= 1:
        return value
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a share from 0 to 1")


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """The type of an argument that is a number in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {what} in {low}..{high}")
        return value

    return parse
