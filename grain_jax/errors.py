"""The base of every user-fixable error: commands print its message and exit with status 2."""

import contextlib
import re
from collections.abc import Callable, Iterator

from grain_jax import printable


class UserError(ValueError):
    """Wrong usage or wrong input; the message has a line per fault: what, where, got, expected, what to do.

    Attributes:
      status: the exit status of the command.
    """

    status = 2

    def __str__(self) -> str:
        """The message, without control characters of file names and texts in it."""
        return printable.plain(super().__str__(), keep="\n\t")


class MissingData(UserError):
    """A data set does not exist; the message is one line and names the command that makes it."""


class OutOfMemory(UserError):
    """There is not enough memory; one line: for what, and what to set."""


MORE_MEMORY = "end what else uses the memory, or take a device or a machine with more"


@contextlib.contextmanager
def out_of_memory_in_a_line(
    what: str, tell: Callable[[], str] = lambda: MORE_MEMORY
) -> Iterator[None]:
    """Inside, a failed allocation (of an allocator or a compiler) is raised as OutOfMemory.

    Args:
      what: the activity, such as "training".
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
        try:
            advice = tell()
        except Exception as second:  # there may be too little memory for the advice
            if not is_out_of_memory(second):
                raise
            advice = MORE_MEMORY
        raise OutOfMemory(f"out of memory in {what}{said}; {advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is a failed allocation of numpy, Python, XLA or TensorFlow."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    exhausted = "RESOURCE_EXHAUSTED" in text or type(error).__name__ == "ResourceExhaustedError"
    # An exhausted quota of a storage has that status, too.
    return exhausted and bool(re.search(r"memory|alloc|\bhbm\b", text, re.IGNORECASE))
