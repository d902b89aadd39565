"""Reads ahead with threads or processes, so that whoever takes the results does not wait."""

import collections
import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_PER_PROCESS = 4  # results in memory
_INLINE = 1000  # with fewer items, starting processes takes longer than the work


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], pool: concurrent.futures.Executor, most: int
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


def default_processes(items: int) -> int:
    """The number of processes for so many items: one per core, or 0 (this process) for a few."""
    return 0 if items < _INLINE else os.cpu_count() or 1


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int
) -> Iterator[Result]:
    """`in_order` in so many processes (0: this one); the caller's main module must be importable."""
    if processes < 1:
        yield from map(function, items)
        return
    # Spawned, not forked: TensorFlow's threads do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn, _leave_with_parent) as pool:
        yield from in_order(function, items, pool, processes * _PER_PROCESS)


def _leave_with_parent() -> None:
    """Ends this worker when its parent ends: it would otherwise wait for ever."""

    def wait():
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
