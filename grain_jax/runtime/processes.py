"""Evaluations on several processes: each computes its share, and all get every result.

With a single process no function asks for devices or waits. All functions but `process_info` and `share` are
collective: every process calls them, in the same order.
"""

import contextlib
import io
import itertools
import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from grain_jax.core import errors

T = TypeVar("T")

_HALF = 1 << 31  # of a length in bytes
_PATIENCE_MS = 7 * 24 * 3600 * 1000  # one share may take hours longer than another
_meetings = itertools.count()
_alone = False
_in_lockstep = False


class Failed(errors.UserError):
    """Another process failed; the message has its number and its lines."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works for itself: the others take no part, and may have ended."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextlib.contextmanager
def lockstep() -> Iterator[None]:
    """Inside, the processes run one model together, so `rounds` and `padded_share` keep them in step."""
    global _in_lockstep
    before, _in_lockstep = _in_lockstep, True
    try:
        yield
    finally:
        _in_lockstep = before


def process_info() -> tuple[int, int]:
    """This process's number and how many there are."""
    if _alone or not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def share(count: int) -> range:
    """The positions of this process, a contiguous part of range(count); each position has one process."""
    index, processes = process_info()
    each, more = divmod(count, processes)
    start = index * each + min(index, more)
    return range(start, start + each + (index < more))


def padded_share(count: int) -> list[int]:
    """`share`, but in lockstep as many positions for each process: the last one repeated."""
    mine, processes = list(share(count)), process_info()[1]
    if not _in_lockstep:
        return mine
    return (mine + [count - 1] * -(-count // processes))[: -(-count // processes)]


def rounds(items: Iterator[T], spare: Callable[[], T]) -> Iterator[tuple[T, bool]]:
    """`items`, each with True; in lockstep, then `spare()` with False while another process has more."""
    while True:
        item = next(items, None)
        if _in_lockstep and any(agree(None, item is not None)):
            yield (spare() if item is None else item), item is not None
        elif item is None:
            return
        else:
            yield item, True


def allgather(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenates the arrays of all processes, in the order of the processes, bit for bit.

    Args:
      batches: each name -> [N, ...] with one N. Names, types and the other axes are the same everywhere;
        a process may have no batch, but at least one process has one.

    Returns:
      Name -> [sum of N, ...], the same on all processes.
    """
    names = batches[0] if batches else {}
    here = {name: np.concatenate([batch[name] for batch in batches]) for name in names}
    if process_info()[1] == 1:
        return here
    file = io.BytesIO()
    np.savez(file, **here)  # pyright: ignore[reportArgumentType] (older ones have no allow_pickle)
    everywhere = [np.load(io.BytesIO(content)) for content in _of_all(file.getvalue())]
    everywhere = [arrays for arrays in everywhere if arrays.files]
    return {name: np.concatenate([x[name] for x in everywhere]) for name in everywhere[0].files}


def run_together(function: Callable[[], T]) -> T:
    """Calls `function` and returns its result; where it fails on one process, all of them raise.

    Raises:
      Exception: see `agree`.
    """
    failure, result = _tried(function)
    agree(failure)
    return result


def of_first(function: Callable[[], T]) -> T:
    """Calls `function` on the first process; returns its result, a JSON value, on all; all raise a failure.

    Raises:
      Exception: see `agree`.
    """
    failure, result = _tried(function) if process_info()[0] == 0 else (None, None)
    return agree(failure, result)[0]


def _tried(function: Callable[[], Any]) -> tuple[Exception | None, Any]:
    try:
        return None, function()
    except Exception as error:
        return error, None


def agree(failure: Exception | None, value: Any = None) -> list[Any]:
    """Every process's JSON-ready `value`, unless one has a failure.

    Raises:
      Exception: the failure of this process, where it is the only one or the failure is a UserError.
      Failed: the failure of another process, or another error of this one (its traceback is printed).
    """
    if process_info()[1] == 1:
        if failure is not None:
            raise failure
        return [value]
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    if isinstance(failure, errors.UserError):
        message = str(failure)
    ends = [json.loads(content) for content in _of_all(json.dumps([message, value]).encode())]
    if isinstance(failure, errors.UserError):
        raise failure
    if failure is not None:
        traceback.print_exception(failure)
    for index, (message, _) in enumerate(ends):
        if message is not None:
            raise Failed(f"process {index}: {message}") from None
    return [value for _, value in ends]


def wait_for_all(key: str) -> None:
    """Waits until all processes are here, however long: a collective gives up after half a minute on CPUs.

    One that dies on the way does not keep the others: the heartbeat ends them.
    """
    import orbax.checkpoint as ocp  # slow to import, and a single process of an evaluation needs none of it

    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=_PATIENCE_MS)


def _of_all(content: bytes) -> list[bytes]:
    """The `content` of each process."""
    from jax.experimental import multihost_utils

    wait_for_all(f"evaluation {next(_meetings)}")
    # In parts: JAX has no 64 bits.
    halves = np.array(divmod(len(content), _HALF), np.uint32)
    lengths = np.asarray(multihost_utils.process_allgather(halves)).astype(int).reshape(-1, 2) @ (_HALF, 1)
    padded = np.frombuffer(content.ljust(lengths.max(), b"\0"), np.uint8)
    everything = np.asarray(multihost_utils.process_allgather(padded))
    return [part[:length].tobytes() for part, length in zip(everything, lengths)]
