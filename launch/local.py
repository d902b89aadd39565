"""Starts a run of several processes on the CPU of this machine, to try what a pod does: grain-jax local"""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from grain_jax.cli import process as cli_process
from grain_jax.core import errors
from grain_jax.launch.arguments import Local
from grain_jax.launch.jobs import PREEMPTED

INTERRUPTED = 130  # as PREEMPTED, after Ctrl-C
_PASSED_ON = {signal.SIGTERM: PREEMPTED, signal.SIGINT: INTERRUPTED}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the processes, waits for them, and returns the exit status."""
    args = Local.parse(argv)
    command = args.command_line
    if command[0] == "grain-jax":  # of this environment, also if its scripts are not on the path
        command = [sys.executable, "-m", "grain_jax", *command[1:]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"

    # Ours is last: of a flag given twice, XLA takes the last.
    flags = f"--xla_force_host_platform_device_count={args.devices_per_process}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes: list[subprocess.Popen] = []
    signals: list[int] = []

    def pass_on(number: int, _) -> None:
        # Ctrl-C of a terminal reaches the processes too; the trainer ignores a second one within a second.
        signals.append(number)
        for process in processes:
            process.send_signal(number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    libc = ctypes.CDLL(None)

    def end_with_launcher() -> None:
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))

    options: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rendezvous = [f"--coordinator={coordinator}", f"--processes={args.processes}"]
    for index in range(args.processes):
        arguments = [*command, *rendezvous, f"--process-id={index}"]
        try:
            process = subprocess.Popen(arguments, env=environment, preexec_fn=end_with_launcher, **options)
        except OSError as error:
            raise errors.UserError(f"grain-jax local: cannot start {command[0]}: {error.strerror}") from None
        processes.append(process)
        for number in signals:  # while we were starting
            process.send_signal(number)
    readers = [  # after all forks: what runs between fork and exec must not meet another thread's locks
        threading.Thread(target=_relay, args=(index, process.stdout), daemon=True)
        for index, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()

    status = _wait(processes, signals, args.grace)
    for reader in readers:
        reader.join(timeout=5)  # what a process has started may hold its output open
    return status


def _wait(processes: list[subprocess.Popen], signals: list[int], grace: float) -> int:
    """Waits for all processes, ends the others if one fails, and returns the status of the launcher."""
    failure, deadline = None, math.inf
    while True:
        running = [index for index, p in enumerate(processes) if p.poll() is None]
        # A signal that was passed on before the process handled signals has its usual status.
        codes = [_PASSED_ON[-n] if n and -n in signals else n for n in (p.returncode for p in processes)]
        if failure is None and (failure := _first_failure(codes, signals)) is not None:
            code = codes[failure] or 0
            how = f"ended with status {code}"
            if code < 0:
                how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
            _say(f"process {failure} {how}" + "; ending the others" * bool(running))
            deadline = time.monotonic() + grace
            for process in processes:
                process.terminate()
        if time.monotonic() > deadline:
            deadline = math.inf
            for index in running:
                _say(f"process {index} did not end within {grace:g} s; killing it")
                processes[index].kill()
        if not running:
            break
        time.sleep(0.05)
    if failure is not None:
        code = codes[failure] or 0
        return 128 - code if code < 0 else code
    return next((status for status in (PREEMPTED, INTERRUPTED) if status in codes), 0)


def _first_failure(codes: list[int | None], signals: list[int]) -> int | None:
    """Index of the process that failed first, or None."""
    fine = [None, 0, PREEMPTED]
    if signal.SIGINT in signals:
        fine.append(INTERRUPTED)
    if PREEMPTED in codes or INTERRUPTED in codes:
        fine.append(-signal.SIGABRT)  # JAX aborts the others of a process that was preempted early
    failed = [index for index, code in enumerate(codes) if code not in fine]
    # It also aborts the others of one that dies: between two looks all may have ended.
    return min(failed, key=lambda index: codes[index] == -signal.SIGABRT, default=None)


def _say(text: str) -> None:
    print(f"grain-jax local: {text}", file=sys.stderr, flush=True)


def _relay(index: int, lines) -> None:
    for line in lines:
        print(f"[{index}] {line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli_process.run(main)
