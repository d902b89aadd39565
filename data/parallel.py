"""Maps a function over many items in several processes, in order, with a bounded backlog."""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from grain_jax.core import ahead

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 4  # items per worker whose results are held in memory
_INLINE = 1000  # with fewer items, starting processes takes longer than the work


def _leave_with_parent() -> None:
    """Ends this worker when its parent ends: it would otherwise wait for ever."""
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def default_workers(items: int) -> int:
    """The number of processes for so many items: one per core, or 0 (this process) for a few."""
    return 0 if items < _INLINE else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Iterator[Result]:
    """`map(function, items)` in `workers` processes (0: this one)."""
    if workers < 1:
        yield from map(function, items)
        return
    # Spawned, not forked: TensorFlow's threads do not survive a fork.
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_leave_with_parent
    ) as pool:
        yield from ahead.in_order(function, items, pool, workers * _AHEAD)
