"""Passes on the C++ log of JAX; where JAX ends the process because another one died, one line says which.

JAX aborts the process with a stack trace in which the dead process is named, and Python cannot catch it. So a
small second process reads descriptor 2 of the trainer (`redirect`) and ends a moment after it.
"""

import collections
import io
import os
import re
import signal
import subprocess
import sys

_FATAL = "because the JAX distributed service detected fatal errors"
# "Task 1 heartbeat timeout"; "... (stopped sending heartbeats):" with a number a line below it.
_DEAD = re.compile(
    r"[Tt]ask (\d+) heartbeat timeout|stopped sending heartbeats\):((?:\s+\d+)+)$", re.M
)


def redirect(heartbeat_seconds: int, start_seconds: int) -> None:
    """Sends descriptor 2 through a reader, which says the seconds; `sys.stderr` keeps writing to the terminal."""
    terminal = os.dup(2)
    reader = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(heartbeat_seconds), str(start_seconds)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the trainer
    )
    assert reader.stdin is not None  # it is a pipe
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    sys.stderr = io.TextIOWrapper(
        io.FileIO(terminal, "w"), errors="backslashreplace", line_buffering=True
    )


def verdict(log: str, heartbeat_seconds: str, start_seconds: str) -> str | None:
    """One line that says why JAX aborted; None if its log does not say."""
    if "RegisterTask" in log:
        return (
            f"ending: not all processes came up within {start_seconds} s; has one failed (see its log), and"
            " can all reach process 0?"
        )
    dead = {int(n) for found in _DEAD.findall(log) for n in " ".join(found).split()}
    if dead:
        who = " and ".join(f"process {n}" for n in sorted(dead))
        how = f"{'have' if len(dead) > 1 else 'has'} not answered for {heartbeat_seconds} s"
    elif "UNAVAILABLE" in log or "DEADLINE_EXCEEDED" in log:
        who, how = "process 0, through which all others hear of each other,", "cannot be reached"
    else:
        return None
    return (
        f"ending: {who} {how}: killed, crashed, preempted or cut off (its own log tells). The same command"
        " resumes the run."
    )


def main(heartbeat_seconds: str, start_seconds: str) -> None:
    """Passes lines on; prints the verdict in place of those that JAX prints when it aborts."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM signals every process of a step
    before: collections.deque[str] = collections.deque(maxlen=40)
    kept: list[str] = []
    for line in sys.stdin:
        if kept or _FATAL in line:
            kept.append(line)
        else:
            before.append(line)
            print(line, end="", file=sys.stderr, flush=True)
    if kept:
        said = verdict("".join([*before, *kept]), heartbeat_seconds, start_seconds)
        print(said or "".join(kept), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
