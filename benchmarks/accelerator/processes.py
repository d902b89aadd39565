"""Parts of a measurement, each in a process of its own, which has the memory of the device to itself."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Part(NamedTuple):
    """Something to measure."""

    table: str  # the list of the results that its rows go to
    what: str  # names it
    run: Callable[..., Iterator[dict[str, Any]]]  # yields rows; picklable
    arguments: Mapping[str, Any]  # of `run`, by keyword
    seconds: float  # that it takes at least; with less left it does not start
    environment: Mapping[str, str] = {}  # variables of its process


class Budget:
    """The seconds that are left of `minutes`."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self._end - self._clock()


def rows(part: Part, limit: float) -> Iterator[dict[str, Any]]:
    """The rows of a part as they come; after `limit` seconds its process and those that it started are killed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, part))
    process.start()
    theirs.close()
    end = time.monotonic() + limit
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            row = ours.recv()
            if row is None:
                return
            yield row
        yield dict(left_out=f"stopped, took more than the {limit:.0f} s that were left")
    except EOFError:
        process.join(timeout=10.0)
        yield dict(left_out=f"its process ended with status {process.exitcode}")
    finally:
        process.join(timeout=2.0)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # ended, or not yet a group of its own
            process.kill()
        process.join()


def _serve(pipe, part: Part) -> None:
    os.setsid()  # so that the trainer which a part starts ends with it
    os.environ.update(part.environment)
    try:
        for row in part.run(**part.arguments):
            pipe.send(row)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0][:300]
        pipe.send(dict(left_out=f"{type(error).__name__}: {line}"))
    pipe.send(None)
