"""How the trainer's process ends: its last words are printed, its mark is removed, and nothing can hold it up.

An ordinary exit joins threads: those of Orbax kept a trainer whose save had failed for 300 s, a reader that stands
at a hung disk would keep it for ever.
"""

import atexit
import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable

from grain_jax import errors

LAST_WORDS_SECONDS = 5.0  # for the output and the actions together: the disk or the reader may hang
_AGREED = (
    0,
    75,
    130,
)  # done, or told to end and saved: several processes leave by JAX's own barrier

_actions: list[Callable[[], None]] = []


def at_end(action: Callable[[], None]) -> None:
    """Lets `action` run once before the process ends, by `leave` or by itself."""
    _actions.append(action)
    atexit.register(action)


def forget(action: Callable[[], None]) -> None:
    """Undoes `at_end`."""
    _actions.remove(action)
    atexit.unregister(action)


def leave(status: int, text: str = "") -> None:
    """Prints `text` on stderr, runs the actions and ends the process, within LAST_WORDS_SECONDS."""

    def last_words():
        # Nobody may read it any more, and the disk may be what failed: no reason to stay.
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
    """What to print of it: the line of a UserError, the traceback of any other."""
    if isinstance(error, errors.UserError):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def run(command: Callable[[], None]) -> None:
    """Runs a command that ends by SystemExit, and then leaves without waiting for threads."""
    import jax  # the launchers, which import the monitor, do without

    try:
        command()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        leave(130 if isinstance(error, KeyboardInterrupt) else 1, describe(error))
    if status in _AGREED and jax.distributed.is_initialized():
        sys.exit(status)
    leave(status)
