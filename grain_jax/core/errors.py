"""The base of every user-fixable error: commands print its message and exit with status 2."""

import contextlib
import errno
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from grain_jax.core import printable


class UserError(ValueError):
    """Wrong usage or wrong input; the message has a line per fault: what, where, got, expected, to do."""

    status = 2  # of the command, when it ends

    def __str__(self) -> str:
        """The message, without control characters of file names and texts in it."""
        return printable.plain(super().__str__(), keep="\n\t")


class MissingData(UserError):
    """A dataset does not exist; the message is one line and names the command that makes it."""


class OutOfMemory(UserError):
    """There is not enough memory; one line: for what, and what to set."""


class StorageFault(UserError):
    """A file cannot be written; the command was right."""

    status = 1


@functools.cache  # once is enough
def silence_storage() -> None:
    """Drops what Orbax and TensorStore print of faults that they raise, too: hundreds of lines."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        reader = getattr(unraisable.object, "__name__", "") == "_read_array_index_and_device_put"
        text = str(unraisable.exc_value)
        is_fault = isinstance(of_system(unraisable.exc_value), StorageFault)
        if not (reader or is_fault or text == "Event loop is closed"):
            before(unraisable)

    def is_news(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return not isinstance(of_system(error), StorageFault)

    sys.unraisablehook = hook
    logging.getLogger("absl").addFilter(is_news)


MORE_MEMORY = "end what else uses the memory, or take a device or a machine with more"


@contextlib.contextmanager
def out_of_memory_in_a_line(activity: str, tell: Callable[[], str] = lambda: MORE_MEMORY) -> Iterator[None]:
    """Inside, a failed allocation (of an allocator or a compiler) is raised as OutOfMemory.

    Args:
      activity: such as "training".
      tell: gives the advice what to set.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        said = re.sub(r"^(\w+: )?RESOURCE_EXHAUSTED: ", "", said).rstrip(".;: ")[:200]
        said = f" ({said})" if said else ""
        raise OutOfMemory(f"out of memory in {activity}{said}; {tell()}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is a failed allocation of numpy, Python, XLA or TensorFlow."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    exhausted = "RESOURCE_EXHAUSTED" in text or type(error).__name__ == "ResourceExhaustedError"
    # An exhausted quota of a storage has that status, too.
    return exhausted and bool(re.search(r"memory|alloc|\bhbm\b", text, re.IGNORECASE))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


_STORAGE = {  # what to do if a file system refuses to write
    errno.ENOSPC: "make room, or name another disk",
    errno.EDQUOT: "make room in the quota, or name another disk",
    errno.EFBIG: "raise the largest size of a file (ulimit -f)",
    errno.EROFS: "name a folder that can be written",
    errno.EIO: "the disk has a fault: name another one",
}


def of_system(error: BaseException | None, output: Any = None) -> UserError | None:
    """What the system refused, as one line, such as to read or write a file; None for any other error.

    The line names the file, or `output`, the path that is written, if the error does not say which.
    """
    for cause in causes(error):
        text, path = str(cause), getattr(cause, "filename", None)
        named = output if path is None else path
        where = "" if named is None else f"{named}: "
        for code, advice in _STORAGE.items():
            said = os.strerror(code)  # TensorFlow and TensorStore raise errors of their own
            if getattr(cause, "errno", None) == code or said in text:
                return StorageFault(f"{where}{said}; {advice}")
        if "Error executing an HTTP request" in text:  # TensorFlow's, of gs://
            return StorageFault(f"{' '.join(text.split())}; expected a network and access to it")
        if isinstance(cause, OSError) and path is not None:
            return UserError(f"{where}{cause.strerror or text}")
    return None


@contextlib.contextmanager
def storage_faults_as_one_line(path: Any, advice: str = "") -> Iterator[None]:
    """Inside, what the system refuses is a UserError of one line, also if TensorStore wraps it.

    Args:
      path: what is written; the line names it if the error names no file.
      advice: the end of the line; with it every such fault is a StorageFault: the command had begun to write.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        fault = of_system(error, path)
        if fault is None:
            raise
        raise (StorageFault(f"{fault}; {advice}") if advice else fault) from error
