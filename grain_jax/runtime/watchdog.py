"""Ends a run that stands still: no step for a time, or a fault after which the process cannot end by itself."""

import contextlib
import faulthandler
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from grain_jax import errors
from grain_jax.runtime import ending

STALLED = 124  # what timeout(1) ends with
FAULT_SECONDS = 60  # after a fault, for the save under way and the threads

# Where the main thread may stand: (file, function) -> words.
_PLACES = {
    ("device.py", "__next__"): "waiting for the next batch (input)",
    ("device.py", "close"): "waiting for the input to stop",
    ("checkpoint.py", "save"): "saving a checkpoint",
    ("checkpoint_manager.py", "wait_until_finished"): "waiting for a checkpoint to be written",
    ("metrics_writer.py", "write"): "writing metrics.jsonl",
    ("metrics_writer.py", "flush"): "uploading the metrics",
    ("receipt.py", "add"): "writing the receipt",
    ("lock.py", "check"): "asking whether the workdir is still its own (trainer.lock)",
    ("train.py", "_train"): "waiting for the devices (a step)",
}


class Watchdog:
    """Ends the process where the loop inside `running` takes no step for a time.

    It counts its own seconds, so that the time in which the machine was suspended does not count.

    Args:
      stall_seconds: the longest time without a step; 0: no limit.
    """

    def __init__(self, stall_seconds: int = 0):
        if stall_seconds < 0:
            raise errors.UserError(
                f"--stall-seconds: got {stall_seconds}, expected seconds without a step, or 0 for no end"
            )
        self._limit = stall_seconds
        self._idle = self._step = self._paused = 0
        self._fault: BaseException | None = None
        self._stopped = threading.Event()
        self._watched = 0

    @contextlib.contextmanager
    def running(self, step: int) -> Iterator[None]:
        """Watches from `step` on until `stop`; after a fault inside, `stop` must come within FAULT_SECONDS."""
        self._step, self._watched = step, threading.get_ident()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        except BaseException as error:
            self._fault, self._idle = error, 0
            raise
        self._idle = 0

    def stepped(self, step: int) -> None:
        """`step` steps are done."""
        self._step, self._idle = step, 0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Does not count the time inside, such as that of an evaluation."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._idle = 0

    def stop(self) -> None:
        """Ends the watch: the run is over."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(1):
            self._idle += not self._paused
            limit = FAULT_SECONDS if self._fault else self._limit
            if limit and self._idle >= limit and not self._stopped.is_set():
                self._end(limit)

    def _end(self, limit: int) -> None:
        where = f"{self._place()}, last step {self._step}. Stacks of all threads: {_dump()}"
        fault = self._fault
        if fault is None:
            ending.leave(
                STALLED,
                f"ending: no step for {limit} s (--stall-seconds); {where}\n"
                "The same command goes on from the newest checkpoint.",
            )
        status = getattr(fault, "status", 1)
        ending.leave(
            status,
            f"{ending.describe(fault)}\nending: not over {limit} s after this fault; {where}",
        )

    def _place(self) -> str:
        """In words, the innermost known place on the main thread's stack."""
        innermost = frame = sys._current_frames().get(self._watched)
        while frame is not None:
            code = frame.f_code
            words = _PLACES.get((Path(code.co_filename).name, code.co_name))
            if words:
                return words
            frame = frame.f_back
        if innermost is None:
            return "its thread is gone"
        code = innermost.f_code
        return f"in {code.co_name} ({code.co_filename}:{innermost.f_lineno})"


def _dump() -> str:
    """The path of a file with the stacks: on this machine, because the workdir may be what hangs."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="grain_jax_stacks_", suffix=".txt", delete=False
        ) as file:
            faulthandler.dump_traceback(file, all_threads=True)
        return file.name
    except OSError as error:
        return f"not written ({error})"
