"""Ends the process of the trainer: prints its last message, removes its lock, and waits for no thread.

An ordinary exit joins all threads. Those of Orbax wait for 300 s after a save that failed; a reader at a hung disk
never ends.
"""

import atexit
import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from grain_jax import errors

LAST_WORDS_SECONDS = 5.0  # for the output and the actions together: the disk or the reader may hang
# Statuses that all processes of a run end with (done, or told to end and saved): JAX's own barrier ends them.
AGREED = (0, 75, 130)

_actions: list[Callable[[], None]] = []


def at_end(action: Callable[[], None]) -> None:
    """Registers `action` to run once before the process ends, by `leave` or by an ordinary exit."""
    _actions.append(action)
    atexit.register(action)


def forget(action: Callable[[], None]) -> None:
    """Undoes `at_end`."""
    _actions.remove(action)
    atexit.unregister(action)


def leave(status: int, text: str = "") -> NoReturn:
    """Prints `text` on stderr, runs the actions and ends the process, within LAST_WORDS_SECONDS."""

    def last_words():
        # A reader that is gone or a disk that failed is no reason to stay.
        with contextlib.suppress(OSError, ValueError):
            if text:
                print(text, file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        for action in _actions[::-1]:
            with contextlib.suppress(Exception):
                action()

    thread = threading.Thread(target=last_words, name="last words", daemon=True)
    thread.start()
    thread.join(LAST_WORDS_SECONDS)
    os._exit(status)


def describe(error: BaseException) -> str:
    """The text to print: the lines of a UserError, the traceback of any other error."""
    if isinstance(error, errors.UserError):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def run(command: Callable[[], None]) -> None:
    """Runs a command, which may raise SystemExit, and ends the process without waiting for threads."""
    import jax  # slow to import, and the launchers do without

    try:
        command()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        leave(130 if isinstance(error, KeyboardInterrupt) else 1, describe(error))
    if status in AGREED and jax.distributed.is_initialized():
        sys.exit(status)
    leave(status)
