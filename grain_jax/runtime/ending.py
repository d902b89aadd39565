"""How the process of a trainer ends: told by a signal, standing still, by a fault, or done.

* `PreemptionHandler`: SIGTERM and Ctrl-C save the state after a step that all agree on, and end the run.
* `Watchdog`: a run that stands still says where.
* `leave` waits for no thread. An ordinary exit joins all threads: Orbax's wait for 300 s after a failed save,
  and a reader at a hung disk never ends.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from grain_jax.core import errors

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: launchers start the same command again
STALLED = 124  # what timeout(1) ends with
INTERRUPTED = 130  # what shells report after Ctrl-C
# Statuses that all processes of a run end with: JAX's own barrier ends them.
AGREED = (0, PREEMPTED, INTERRUPTED)
LAST_WORDS_SECONDS = 5.0  # for the output and the actions together: the disk or the reader may hang
FAULT_SECONDS = 60  # after a fault, for the save under way and the threads
_SAME_SECONDS = 1.0  # a terminal's Ctrl-C reaches a process twice, also from its launcher
# That process 0 stays, so that the others get the signal: JAX aborts them once it is gone.
_LAST_SECONDS = 2.0

_actions: list[Callable[[], None]] = []
_jax_handler: Callable[[int], None] | None = None  # of SIGTERM, under `jax.distributed`
_leaves_last = False


def at_end(action: Callable[[], None]) -> None:
    """Registers `action` to run once before the process ends, by `leave` or by an ordinary exit."""
    _actions.append(action)
    atexit.register(action)


def leave(status: int, text: str = "", *, stacks: bool = False) -> NoReturn:
    """Prints `text` on stderr, runs the actions and ends the process, within LAST_WORDS_SECONDS.

    With `stacks` it also prints where each thread stands.
    """

    def last_words():
        # A reader that is gone or a disk that failed is no reason to stay.
        with contextlib.suppress(OSError, ValueError):
            if text:
                print(text, file=sys.stderr, flush=True)
            if stacks:
                faulthandler.dump_traceback(sys.stderr)
            sys.stdout.flush()
        for action in _actions[::-1]:
            with contextlib.suppress(Exception):
                action()

    thread = threading.Thread(target=last_words, name="last words", daemon=True)
    thread.start()
    thread.join(LAST_WORDS_SECONDS)
    os._exit(status)


def end_by(error: BaseException) -> tuple[int, str]:
    """(status, text) of a process that `error` ends: lines of a UserError or the system, or a traceback."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None), ""
    fault = error if isinstance(error, errors.UserError) else errors.of_system(error)
    if fault is not None:
        return fault.status, str(fault)
    status = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return status, "".join(traceback.format_exception(error)).rstrip()


def run(command: Callable[[], None]) -> None:
    """Runs a command, which may raise SystemExit, and ends the process without waiting for threads."""
    try:
        command()
        status, text = 0, ""
    except BaseException as error:
        status, text = end_by(error)
    if status in AGREED and not text and jax.distributed.is_initialized():
        sys.exit(status)
    leave(status, text)


def take_sigterm_back(*, leaves_last: bool) -> None:
    """Gives SIGTERM back to a PreemptionHandler that listened before `jax.distributed.initialize`.

    JAX replaces Python's handler by a C function, which sets the flag that makes the processes agree on a
    step. `PreemptionHandler.tell` calls that function.

    Args:
      leaves_last: whether this is process 0.
    """
    global _jax_handler, _leaves_last
    ours = signal.getsignal(signal.SIGTERM)  # Python does not know that it was replaced
    if callable(ours):
        ctypes.pythonapi.PyOS_getsig.restype = ctypes.c_void_p
        installed = ctypes.pythonapi.PyOS_getsig(signal.SIGTERM)
        _jax_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(installed)
        _leaves_last = leaves_last
        signal.signal(signal.SIGTERM, ours)


class PreemptionHandler:
    """Handles SIGTERM and Ctrl-C; inactive until `listen`.

    A first signal in training asks all processes to save and end after a step. A signal outside training ends
    the process at once: there is nothing to save. So does a second signal more than a second after the first,
    even if the main thread hangs.
    """

    def __init__(self):
        self.status = PREEMPTED  # exit status of a run that was told to end: PREEMPTED or INTERRUPTED
        self._told = self._training = False
        self._usr2: Callable[[], None] | None = None
        self._first = 0.0  # when the first signal of the training came

    def listen(self) -> None:
        """Starts to handle the signals; call it on the main thread, before `jax.distributed` starts."""
        # Python runs its handlers between two of its own instructions, so not while XLA compiles for minutes.
        # The number of a signal is written to this socket at once.
        signals, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._receive, args=(signals,), name="signals", daemon=True).start()

    def on_usr2(self, action: Callable[[], None]) -> None:
        """Calls `action` at each SIGUSR2, on a thread of its own."""
        self._usr2 = action

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Marks the training: inside, a first signal ends the run at the step of `reached`."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def tell(self, number: int) -> None:
        """Asks the run to end, as a signal in training does; only the first call counts."""
        if _jax_handler and jax.distributed.is_initialized():
            _jax_handler(signal.SIGTERM)  # tells all processes, also of a Ctrl-C to one
        elif not self._told:
            self._told = True
            if number == signal.SIGINT:
                self.status = INTERRUPTED

    def reached(self, step: int) -> bool:
        """Whether to save and end after this step; the same answer on all processes.

        All processes call it after every step. Under `jax.distributed` they agree on a step that lies ahead.
        Orbax asks JAX with the same number when it saves.
        """
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told

    def _receive(self, signals: socket.socket) -> None:
        while True:
            for number in signals.recv(16):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._answer(number)
                elif number == signal.SIGUSR2 and self._usr2:
                    self._usr2()

    def _answer(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        if not self._training:
            if _leaves_last:
                time.sleep(_LAST_SECONDS)
            leave(status, f"\n{name}: there is nothing to save")
        if not self._first:
            self._first = now
            self.tell(number)
            with contextlib.suppress(OSError):  # nobody reads it any more
                said = f"\n{name}: saving after this step; a second signal ends without"
                print(said, file=sys.stderr, flush=True)
        elif now - self._first > _SAME_SECONDS:
            again = "the same command goes on from the newest checkpoint"
            leave(status, f"\n{name}, the second: ending at once; {again}")


class Watchdog:
    """Ends the process where the loop inside `running` takes no step for a time.

    It counts its own seconds, so that the time in which the machine was suspended does not count.

    Args:
      stall_seconds: the longest time without a step; 0: no limit.
    """

    def __init__(self, stall_seconds: int = 0):
        self.late = 0.0  # seconds in which the process stood still: stopped by a signal, or without a core
        self._limit = stall_seconds
        self._idle = self._step = self._paused = 0
        self._activity = "waiting for the devices (a step)"
        self._fault: BaseException | None = None
        self._stopped = threading.Event()

    @contextlib.contextmanager
    def running(self, step: int) -> Iterator[None]:
        """Watches from `step` on until `stop`, which must come within FAULT_SECONDS after a fault inside."""
        self._step = step
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        except BaseException as error:
            self._fault = error
            raise
        finally:
            self._idle = 0

    def stepped(self, step: int) -> None:
        """`step` steps are done."""
        self._step, self._idle = step, 0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Does not count the time inside, such as an evaluation."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._idle = 0

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Names what the block does, for the message; outside any, the loop waits for the devices."""
        outer, self._activity = self._activity, activity
        try:
            yield
        finally:
            self._activity = outer

    def stop(self) -> None:
        """Ends the watch: the run is over."""
        self._stopped.set()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(1):
            now = time.monotonic()
            self.late, before = self.late + (now - before - 1) * (now - before > 1.5), now
            self._idle += not self._paused
            limit = FAULT_SECONDS if self._fault else self._limit
            if not limit or self._idle < limit:
                continue
            status, text = STALLED, f"ending: no step for {limit} s (--stall-seconds)"
            if self._fault is not None:
                status, text = end_by(self._fault)
                text += f"\nending: not over {limit} s after this fault"
            text += f"; {self._activity}, last step {self._step}. Stacks of all threads:"
            leave(status, text, stacks=True)
