"""SIGTERM and Ctrl-C: the run ends after a step that all processes agree on, with its state saved.

A process that has nothing to save (it starts, compiles, or draws the last pictures) ends at once. Either way
the status is 75, which launchers answer with the same command again, or 130 after Ctrl-C.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # what shells report after Ctrl-C
_HEARD = (signal.SIGTERM, signal.SIGINT)


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
        """Inside, there is something to save: signals wait for `reached`."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def tell(self, number: int) -> None:
        """What `listen` does with a signal in training; later ones change nothing."""
        if number == signal.SIGINT and jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)  # JAX passes that one on to all processes
        elif not self._told:
            self._told = True
            if number == signal.SIGINT:
                self.status = INTERRUPTED

    def reached(self) -> bool:
        """Whether this step is the one to save and end at: the same answer on all processes.

        All of them ask after every step. Under `jax.distributed`, JAX's own handler of SIGTERM makes them agree on
        the number of a call (`reached_preemption_sync_point`): one that lies ahead, so the calls are counted
        from 1, not from the step that was restored.
        """
        self._calls += 1
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._told

    def _hear(self, signals: socket.socket) -> None:
        while True:
            for number in signals.recv(16):
                name = signal.Signals(number).name
                if number not in _HEARD:
                    continue
                if self._training:
                    print(f"\n{name}: saving after this step", file=sys.stderr, flush=True)
                    self.tell(number)
                else:
                    print(f"\n{name}: there is nothing to save", file=sys.stderr, flush=True)
                    if self.child is not None:
                        self.child.terminate()
                    os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)
