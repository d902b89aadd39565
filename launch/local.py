"""A run of several processes on this machine's CPU, to see what a pod would do.

    python -m launch.local --processes P --devices-per-process D -- python -m grain_jax.train ...

Each process has D virtual devices and serves its share of the lanes. Lines are prefixed with the
process. The first process that fails ends the others, and its status is the launcher's.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time


def main() -> int:
    """Starts the processes, waits, and returns the first failing one's status, or 0."""
    parser = argparse.ArgumentParser(prog="launch.local", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices-per-process", type=int, default=1)
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="-- python -m grain_jax.train ..."
    )
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command or args.processes < 1 or args.devices_per_process < 1:
        parser.error("expected --processes >= 1, --devices-per-process >= 1 and -- COMMAND")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"

    flags = f"--xla_force_host_platform_device_count={args.devices_per_process}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes, readers = [], []
    for i in range(args.processes):
        rendezvous = [
            f"--coordinator={coordinator}",
            f"--processes={args.processes}",
            f"--process_id={i}",
        ]
        process = subprocess.Popen(
            [*command, *rendezvous],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        readers.append(threading.Thread(target=_relay, args=(i, process.stdout)))
        readers[-1].start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: [p.send_signal(n) for p in processes])

    status = 0
    while any(p.poll() is None for p in processes):
        failed = [(i, p.returncode) for i, p in enumerate(processes) if p.poll()]
        if failed and not status:
            index, status = failed[0]
            print(
                f"launch.local: process {index} ended with {status}; ending the others",
                file=sys.stderr,
            )
            for p in processes:
                p.terminate()
        time.sleep(0.1)
    for reader in readers:
        reader.join()
    return status or next((p.returncode for p in processes if p.returncode), 0)


def _relay(index: int, lines) -> None:
    for line in lines:
        print(f"[{index}] {line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
