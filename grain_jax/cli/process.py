"""A command as a process: faults of its user become lines on stderr, and its exit status."""

import contextlib
import io
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from grain_jax.core import errors, printable

USAGE_ERROR = errors.UserError.status
_NO_READER = 141  # as a shell says it: 128 + SIGPIPE
# What lines of progress begin and end with; everything else that moves the terminal becomes an escape.
_PROGRESS = re.compile(r"(\r?(?:\x1b\[2?K)?)(.*?)((?:\x1b\[K)?\r?)", re.DOTALL)


class _PlainStream:
    """A stream of text to which file names, URLs and texts of users are printed as `printable.plain`."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        """Writes what is waiting."""
        self._stream.flush()

    def write(self, text: str) -> int:
        """Writes the text; returns its length."""
        if not text.isprintable() and (parts := _PROGRESS.fullmatch(text)):
            begin, said, end = parts.groups()
            self._stream.write(begin + printable.plain(said, keep="\n\t") + end)
        else:
            self._stream.write(text)
        return len(text)


def fail(message: object, status: int = USAGE_ERROR) -> NoReturn:
    """Prints the faults, a line each, and their number on stderr; exits, with status 2 for wrong usage."""
    lines = str(message).strip().splitlines()
    print(*lines, sep="\n", file=sys.stderr)
    if len(lines) > 1:
        print(f"{len(lines)} lines of faults; nothing was run", file=sys.stderr)
    sys.exit(status)


def console(declared: Any, command: Callable[[Any], str | None], arguments: Sequence[str] | None) -> int:
    """Runs a command with its flags, prints the line that it returns, and returns its exit status.

    Args:
      declared: the `cli.parser.Command` with the flags.
      command: takes the flags.
      arguments: as of `run`.
    """
    args = None
    try:
        args = declared.parse(arguments)
        if line := command(args):
            print(line)
    except Exception as error:
        output = getattr(args, "output", None)
        fault = error if isinstance(error, errors.UserError) else errors.of_system(error, output)
        if fault is None:
            raise
        print(fault, file=sys.stderr)
        return fault.status
    return 0


def run(
    main: Callable[[Sequence[str] | None], int | None], arguments: Sequence[str] | None = None
) -> NoReturn:
    """Runs a command and exits with its status; what it prints cannot move the terminal.

    Args:
      main: takes the arguments and returns the status, None for 0.
      arguments: without the program's name; by default the arguments of this process.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    errors.silence_storage()
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # it was closed, as by `>&-`
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):  # what the encoding lacks becomes escapes
            stream.reconfigure(errors="backslashreplace")
    with (
        contextlib.redirect_stdout(_PlainStream(sys.stdout)),
        contextlib.redirect_stderr(_PlainStream(sys.stderr)),
    ):
        try:
            with errors.out_of_memory_in_a_line("this command"):
                status = main(arguments)
            _flush()
            sys.exit(status or 0)
        except errors.UserError as error:
            fail(error, error.status)
        except SystemExit:  # of --help, too
            _flush()
            raise
        except BrokenPipeError:
            _flush()
            if _reader_is_gone():
                os._exit(_NO_READER)
            raise
        except Exception as error:
            fault = errors.of_system(error)
            if fault is None:
                raise
            fail(fault, fault.status)


def _flush() -> None:
    """Ends the process silently if the reader of stdout is gone, as with `| head`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(_NO_READER)


def _reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads: an unbuffered stream has nothing to flush."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
