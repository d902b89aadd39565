"""Progress on stderr, with the time left: a line that a terminal rewrites; elsewhere a line now and then."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

PLAIN_SECONDS = 15.0  # between two lines without a terminal
_TERMINAL_SECONDS = 0.2  # between two of a terminal
COMPILING_SECONDS = 2.0  # that compiling takes before a line says so
_ERASE = "\r\x1b[2K"
_said: set[str] = set()  # the programs of `while_compiling` that were said


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m05s or 2h10m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class ProgressLine:
    """A line of progress, which changes, below lines that stay.

    Args:
      prefix: of every line.
      silent: nothing is printed: of several processes, the first one speaks.
    """

    def __init__(self, prefix: str = "", silent: bool = False):
        self._prefix, self._silent = prefix, silent
        self._terminal = sys.stderr.isatty()
        self._every = _TERMINAL_SECONDS if self._terminal else PLAIN_SECONDS
        self._shown_at, self._shown = time.monotonic(), ""

    def show(self, text: str, *, now: bool = False) -> None:
        """Shows the progress if it has changed; without `now` not so soon after the last time."""
        waited = time.monotonic() - self._shown_at
        if self._silent or text == self._shown or not (now or waited >= self._every):
            return
        self._shown_at, self._shown = self._shown_at + waited, text
        text = self._prefix + text
        if self._terminal:  # a line that wraps could not be rewritten
            text = _ERASE + text[: shutil.get_terminal_size().columns - 1]
        print(text, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a line that stays, above the progress."""
        if not self._silent:
            erase = _ERASE if self._terminal else ""
            print(f"{erase}{self._prefix}{text}", file=sys.stderr, flush=True)
            self._shown = ""

    def close(self, *, stays: bool = False) -> None:
        """Clears the line of a terminal, or leaves it standing."""
        if self._terminal and self._shown and not self._silent:
            print("\n" if stays else _ERASE, end="", file=sys.stderr, flush=True)


class Counter:
    """Shows how many went by, how fast, and the time left.

    Args:
      label: begins the line.
      total: how many there are; None if unknown.
      unit: of what is counted.
      silent: nothing is printed.
      times: how many stand for each that is counted: of several processes, the first counts for all.
    """

    def __init__(self, label: str, total: float | None, unit: str = "", *, silent=False, times: float = 1):
        self._label, self._total, self._unit, self._times = label, total, unit, times
        self._line, self._start, self.done = ProgressLine(silent=silent), time.monotonic(), 0.0
        self._first: tuple[float, float] | None = None  # seconds and share of the first, which compiles

    def add(self, count: int = 1, share: float | None = None) -> None:
        """Counts, and shows it; `share` of the work is done, by default the count of the total."""
        self.done += count * self._times
        seconds = time.monotonic() - self._start
        if self._first is None:
            self._first = (
                seconds,
                (self.done / self._total if self._total else 0.0) if share is None else share,
            )
        self._line.show(self.text(seconds, share))

    def text(self, seconds: float, share: float | None = None) -> str:
        """The line after so many seconds."""
        if share is None and self._total:
            share = self.done / self._total
        count = f"{self.done:.0f}" + (f"/{self._total:.0f}" if self._total is not None else "")
        before, done = self._first or (0.0, 0.0)
        left = ""
        if share and share > done:  # at the speed since the first one
            left = f", ETA {duration((seconds - before) / (share - done) * (1 - share))}"
        rate = self.done / max(seconds, 1e-9)
        return f"{self._label}: {count}{self._unit and ' '}{self._unit}, {rate:.3g}/s{left}"

    def close(self, *, stays: bool = False) -> None:
        """Clears the line of a terminal, or shows the last one and leaves it."""
        if stays:
            self._line.show(self.text(time.monotonic() - self._start), now=True)
        self._line.close(stays=stays)


def over(items: Iterable[Item], *, total: float | None, what: str) -> Iterator[Item]:
    """Passes `items` on and counts them."""
    counter = Counter(what, total)
    try:
        for item in items:
            yield item
            counter.add()
    finally:
        counter.close()


@contextlib.contextmanager
def while_compiling(
    program: str, usually: str, *, silent: bool = False, once: bool = False
) -> Iterator[None]:
    """Says on stderr what is compiled if that takes long, and then every PLAIN_SECONDS that it goes on.

    Args:
      program: what is compiled.
      usually: how long that takes, "usually up to 2 minutes".
      silent: nothing is printed: of several processes, the first one speaks.
      once: it is said for the first program of that name alone.
    """
    if silent or (once and program in _said):
        yield
        return
    line, finished, start = ProgressLine(), threading.Event(), time.monotonic()

    def report() -> None:
        if finished.wait(COMPILING_SECONDS):
            return
        line.say(f"compiling {program}, {usually}")
        _said.add(program)
        while not finished.wait(PLAIN_SECONDS):
            line.say(f"still compiling {program}: {duration(time.monotonic() - start)} so far")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
