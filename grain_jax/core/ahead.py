"""Reads ahead with threads or processes, so that whoever takes the results does not wait."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], pool: Executor, most: int
) -> Iterator[Result]:
    """`map(function, items)` by the workers of `pool`, in order, with at most `most` results ahead."""
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
