"""Progress of a long loop: a bar on a terminal, otherwise a line every 15 seconds, both with the time left."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 15.0


def progress(items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
    """Passes `items` on and reports on stderr how many of `total` went by, how fast, and what is left."""
    if sys.stderr.isatty():
        yield from tqdm.tqdm(items, total=total, desc=what, unit="", file=sys.stderr)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last, rate = now, done / (now - start)
            left = (total - done) / rate
            print(f"{what}: {done}/{total}, {rate:.3g}/s, {left:.0f} s left", file=sys.stderr)
