"""The base of every error that is the user's to mend: commands print it as it is and exit with status 2."""

import contextlib
import re
from collections.abc import Callable, Iterator

from grain_jax import printable


class UserError(ValueError):
    """Wrong usage or wrong input; the message has one line a fault: what, where, got, expected, what to do.

    Attributes:
      status: that the command exits with.
    """

    status = 2

    def __str__(self) -> str:
        """The message; file names and texts in it cannot move the terminal."""
        return printable.plain(super().__str__(), keep="\n\t")


class MissingData(UserError):
    """A data set is not there; the message is one line and names the command that makes it."""


class OutOfMemory(UserError):
    """There is not enough memory; one line: what for, and what to set."""


MORE_MEMORY = "end what else uses the memory, or take a device or a machine with more"


@contextlib.contextmanager
def out_of_memory_in_a_line(
    what: str, tell: Callable[[], str] = lambda: MORE_MEMORY
) -> Iterator[None]:
    """Memory that an allocator or a compiler refuses inside becomes an OutOfMemory.

    Args:
      what: is being done: "training".
      tell: says what to set.
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
        except Exception as second:  # there may be too little to work it out
            if not is_out_of_memory(second):
                raise
            advice = MORE_MEMORY
        raise OutOfMemory(f"out of memory in {what}{said}; {advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is a refused allocation: of numpy or Python, of XLA, or of TensorFlow."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    exhausted = "RESOURCE_EXHAUSTED" in text or type(error).__name__ == "ResourceExhaustedError"
    # The quota of a storage has that status, too.
    return exhausted and bool(re.search(r"memory|alloc|\bhbm\b", text, re.IGNORECASE))
