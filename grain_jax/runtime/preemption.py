"""Handles SIGTERM and Ctrl-C: saves the state after a step that all processes agree on, and ends the run.

A second signal, more than a second after the first, ends the process at once, also where the main thread hangs. A
process that has nothing to save (it starts, compiles, or draws the last images) ends at the first signal, also
under `jax.distributed`, whose handler of SIGTERM would prevent it. The status is 75, after which launchers start the
same command again, or 130 after Ctrl-C.
"""

import contextlib
import ctypes
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from grain_jax.runtime import ending

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # what shells report after Ctrl-C
_HANDLED = (signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 1.0  # a terminal's Ctrl-C reaches a process twice, also from its launcher
_LAST_SECONDS = (
    2.0  # that process 0 stays, so that the others get the signal: JAX aborts them once it is gone
)

_jax_handler: Callable[[int], None] | None = None  # of SIGTERM, under `jax.distributed`
_leaves_last = False


def take_sigterm_back(*, leaves_last: bool) -> None:
    """Gives SIGTERM back to a PreemptionHandler that listened before `jax.distributed.initialize`.

    JAX replaces Python's handler by a C function, which sets the flag that makes the processes agree on a step.
    `PreemptionHandler.tell` calls that function.

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
    """Handles the signals that end a run; inactive until `listen`.

    Attributes:
      status: exit status of a run that was told to end: PREEMPTED or INTERRUPTED.
      child: a process to end together with this one while there is nothing to save, or None.
    """

    def __init__(self):
        self.status = PREEMPTED
        self.child: subprocess.Popen | None = None
        self._told = False
        self._training = False
        self._calls = 0
        self._first = 0.0  # when the first signal of the training came

    def listen(self) -> None:
        """Starts to handle SIGTERM and SIGINT; call it on the main thread, before `jax.distributed` starts."""
        # Python runs its handlers between two of its own instructions, so not while XLA compiles for minutes.
        # The number of a signal is written to this socket at once.
        signals, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in _HANDLED:
            signal.signal(number, lambda number, frame: None)
        thread = threading.Thread(
            target=self._receive, args=(signals,), name="signals", daemon=True
        )
        thread.start()

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

    def reached(self) -> bool:
        """Whether to save and end after this step; the same answer on all processes.

        All processes call it after every step. Under `jax.distributed` they agree on the number of a call
        (`reached_preemption_sync_point`) that lies ahead, so calls are counted from 1, not from the restored step.
        """
        self._calls += 1
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._told

    def _receive(self, signals: socket.socket) -> None:
        while True:
            for number in signals.recv(16):
                if number in _HANDLED:
                    self._answer(number)

    def _answer(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        if not self._training:
            if self.child is not None:
                self.child.terminate()
            if _leaves_last:
                time.sleep(_LAST_SECONDS)
            ending.leave(status, f"\n{name}: there is nothing to save")
        if not self._first:
            self._first = now
            self.tell(number)
            # In another thread: where nobody reads the output, this one must still receive the second signal.
            said = f"\n{name}: saving after this step; a second signal ends without"
            words = threading.Thread(target=_say, args=[said], daemon=True)
            words.start()
        elif now - self._first > _SAME_SECONDS:
            ending.leave(
                status,
                f"\n{name}, the second: ending at once; the same command goes on from the newest checkpoint",
            )


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
