"""SIGTERM and Ctrl-C: the run ends after a step that all processes agree on, with its state saved.

A second signal, more than a second after the first, ends the process at once: whatever hangs, the thread that hears
signals does not.
A process that has nothing to save (it starts, compiles, or draws the last images) ends at once, also under
`jax.distributed`, whose own handler of SIGTERM would not let it. Either way the status is 75, which launchers
answer with the same command again, or 130 after Ctrl-C.
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
_HEARD = (signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 1.0  # a terminal's Ctrl-C reaches a process twice, also from its launcher
_FOR_ALL_TO_HEAR = 2.0  # seconds that process 0 stays: the others are aborted once it is gone

_tell_jax: Callable[[int], None] | None = None  # its handler of SIGTERM, under `jax.distributed`
_leaves_last = False


def take_sigterm_back(*, leaves_last: bool) -> None:
    """Lets `Notice` hear SIGTERM again, after `jax.distributed.initialize`, if it listened before.

    JAX puts a C function in the place of Python's handler. All that this does is to set a flag, on which the
    processes agree on a step; `Notice.tell` calls it.

    Args:
      leaves_last: whether this is process 0.
    """
    global _tell_jax, _leaves_last
    ours = signal.getsignal(signal.SIGTERM)  # Python does not know that it was replaced
    if callable(ours):
        ctypes.pythonapi.PyOS_getsig.restype = ctypes.c_void_p
        installed = ctypes.pythonapi.PyOS_getsig(signal.SIGTERM)
        _tell_jax = ctypes.CFUNCTYPE(None, ctypes.c_int)(installed)
        _leaves_last = leaves_last
        signal.signal(signal.SIGTERM, ours)


class Notice:
    """Whether the run was told to end. Hears nothing before `listen`.

    Attributes:
      status: what the process then ends with: PREEMPTED or INTERRUPTED.
      child: a process that is to end with this one while there is nothing to save, or None.
    """

    def __init__(self):
        self.status = PREEMPTED
        self.child: subprocess.Popen | None = None
        self._told = False
        self._training = False
        self._calls = 0
        self._first = 0.0  # when the first signal of the training came

    def listen(self) -> None:
        """Hears SIGTERM and SIGINT from now on; on the main thread, and before `jax.distributed` starts."""
        # Python runs its handlers between two of its own instructions, so not while XLA compiles for minutes.
        # The number of a signal, though, is written to this socket at once.
        hears, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in _HEARD:
            signal.signal(number, lambda number, frame: None)
        thread = threading.Thread(target=self._hear, args=(hears,), name="signals", daemon=True)
        thread.start()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Inside, there is something to save: the first signal waits for `reached`."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def tell(self, number: int) -> None:
        """What `listen` does with a signal in training; the first one counts."""
        if _tell_jax:
            _tell_jax(signal.SIGTERM)  # all processes hear of it, also of a Ctrl-C to one
        elif not self._told:
            self._told = True
            if number == signal.SIGINT:
                self.status = INTERRUPTED

    def reached(self) -> bool:
        """Whether this step is the one to save and end at: the same answer on all processes.

        All of them ask after every step. Under `jax.distributed`, what `tell` passes on makes them agree on the
        number of a call (`reached_preemption_sync_point`): one that lies ahead, so the calls are counted from 1,
        not from the step that was restored.
        """
        self._calls += 1
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._told

    def _hear(self, signals: socket.socket) -> None:
        while True:
            for number in signals.recv(16):
                if number in _HEARD:
                    self._answer(number)

    def _answer(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        if not self._training:
            if self.child is not None:
                self.child.terminate()
            if _leaves_last:
                time.sleep(_FOR_ALL_TO_HEAR)
            ending.leave(status, f"\n{name}: there is nothing to save")
        if not self._first:
            self._first = now
            self.tell(number)
            # A thread of its own: where nobody reads the output, this one must hear the second signal.
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
