"""Evaluations on several processes: each computes its share, and all get every result.

With a single process no function asks for devices or waits. All functions but `process_info` and `share` are
collective: every process calls them, in the same order.
"""

import contextlib
import itertools
import json
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from grain_jax.core import errors

T = TypeVar("T")

_PATIENCE_MS = 7 * 24 * 3600 * 1000  # one share may take hours longer than another
_meetings = itertools.count()
_alone = False


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


def allgather(
    parts: Iterable[Mapping[str, np.ndarray]] | Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Concatenates the arrays of all processes, in the order of the processes, bit for bit.

    Args:
      parts: batches, or one, each name -> [N, ...] with one N. Names, types and the other axes are the same everywhere;
        a process may have no batch, but at least one process has one.

    Returns:
      Name -> [sum of N, ...], the same on all processes.
    """
    batches: list[Any] = [parts] if isinstance(parts, Mapping) else list(parts)
    here = {
        name: np.concatenate([batch[name] for batch in batches]) for name in (batches or [{}])[0]
    }
    if process_info()[1] == 1:
        return here
    kinds = [[name, value.dtype.str, value.shape[1:]] for name, value in here.items()]
    kinds = next(filter(None, allgather_values(kinds)))
    here = here or {name: np.zeros((0, *row), dtype) for name, dtype, row in kinds}
    rows = len(here[kinds[0][0]])
    packed = [np.ascontiguousarray(here[name]).reshape(-1).view(np.uint8) for name, _, _ in kinds]
    widths = [np.dtype(dtype).itemsize * math.prod(row) for _, dtype, row in kinds]
    packed = [part.reshape(rows, width) for part, width in zip(packed, widths)]
    everything = np.concatenate(_of_all(np.concatenate(packed, axis=1)))
    columns = np.split(everything, np.cumsum(widths)[:-1], axis=1)
    return {
        name: np.ascontiguousarray(part).reshape(-1).view(dtype).reshape(-1, *row)
        for part, (name, dtype, row) in zip(columns, kinds)
    }


def allgather_values(value: Any) -> list[Any]:
    """Each process's JSON-ready value, in the order of the processes."""
    if process_info()[1] == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)[:, None]
    return [json.loads(part.tobytes()) for part in _of_all(encoded)]


def run_together(function: Callable[[], T]) -> T:
    """Calls `function` and returns its result; where it fails on one process, all of them raise.

    Raises:
      Exception: see `agree`.
    """
    failure, result = _tried(function)
    agree(failure)
    return result


def of_first(function: Callable[[], T]) -> T:
    """Calls `function` on the first process and returns its result, a JSON value, on all; all raise where it fails.

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
    if failure is not None and process_info()[1] == 1:
        raise failure
    ends = allgather_values([_words(failure), value])
    if isinstance(failure, errors.UserError):
        raise failure
    if failure is not None:
        traceback.print_exception(failure)
    for index, (message, _) in enumerate(ends):
        if message is not None:
            raise Failed(f"process {index}: {message}") from None
    return [value for _, value in ends]


def _words(failure: Exception | None) -> str | None:
    if failure is None or isinstance(failure, errors.UserError):
        return None if failure is None else str(failure)
    return f"{type(failure).__name__}: {failure}"


def wait_for_all(key: str) -> None:
    """Waits until all processes are here, however long: a collective gives up after half a minute on CPUs.

    One that dies on the way does not keep the others: the heartbeat ends them.
    """
    import orbax.checkpoint as ocp  # slow to import, and a single process of an evaluation needs none of it

    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=_PATIENCE_MS)


def _of_all(rows: np.ndarray) -> list[np.ndarray]:
    """Each process's `rows`, uint8 [N, W], of which N may differ."""
    from jax.experimental import multihost_utils

    wait_for_all(f"evaluation {next(_meetings)}")
    lengths = multihost_utils.process_allgather(np.array([len(rows)], np.int32)).reshape(-1)
    padded = np.zeros((lengths.max(), rows.shape[1]), np.uint8)
    padded[: len(rows)] = rows
    everything = np.asarray(multihost_utils.process_allgather(padded))
    return [part[:length] for part, length in zip(everything, lengths)]
