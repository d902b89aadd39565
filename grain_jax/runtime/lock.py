"""One trainer per workdir: the lock `WORKDIR/trainer.lock` names the process that trains there.

A second trainer is refused while the first lives. On the same machine and container the process is looked up.
Elsewhere it lives as long as it renews its lock, every RENEW_SECONDS. A lock that does not change for
DEAD_SECONDS, by the clock of the second trainer, belongs to a dead one. TensorStore replaces locks by
conditional writes, in stores and folders alike. A trainer that lost its lock ends at its next renewal.
"""

import contextlib
import datetime
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from etils import epath

from grain_jax.core import errors
from grain_jax.runtime import ending

FILE = "trainer.lock"
RENEW_SECONDS = 10
DEAD_SECONDS = 90  # NFS shows the file of another host up to 60 s late


class Holder(msgspec.Struct, frozen=True):
    """The process that holds a lock."""

    host: str
    pid: int
    began: str  # time and date, for people
    boot: str  # boot and container, in which `pid` is unique; "" if unknown
    started: int  # ticks since the boot, because a pid may be used again
    token: str  # of this lock
    renewed: int = 0  # number of renewals

    def lives(self) -> bool | None:
        """Whether its process exists; None if it cannot be looked up."""
        return _started(self.pid) == self.started if self.boot and self.boot == _boot() else None


def _boot() -> str:
    with contextlib.suppress(OSError):  # no Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _started(pid: int) -> int | None:
    """The start of a process, in ticks; None if it does not exist or is a zombie."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    return None


def this_process() -> Holder:
    """This process as the holder of a new lock."""
    began = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
    pid, token = os.getpid(), secrets.token_hex(8)
    return Holder(socket.gethostname(), pid, began, _boot(), _started(pid) or 0, token)


def parse(content: bytes | None) -> Holder | None:
    """The holder that a lock names; None if there is no lock, or its content is none."""
    with contextlib.suppress(ValueError, RecursionError):
        return msgspec.json.decode(content or b"", type=Holder)
    return None


class Lock:
    """The lock of this process, renewed by a thread until `release`. Raises UserError: another has it."""

    def __init__(self, workdir: epath.Path):
        import tensorstore  # Orbax's; a second to import

        url = str(workdir) if "://" in str(workdir) else Path(workdir).resolve().as_uri()
        self._store = tensorstore.KvStore.open(url.rstrip("/") + "/").result()
        self._workdir, self._holder = workdir, this_process()
        self._take()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew_always, name=FILE, daemon=True)
        self._thread.start()
        ending.at_end(self.release)

    def read(self) -> tuple[bytes | None, bytes]:
        """(content of the lock or None, its version)."""
        read = self._store.read(FILE).result()
        return read.value if read.state == "value" else None, read.stamp.generation

    def swap(self, version: bytes, holder: Holder | None) -> bool:
        """Replaces that version (None removes it); False if another process was faster."""
        content = None if holder is None else msgspec.json.encode(holder) + b"\n"
        return self._store.write(FILE, content, if_equal=version).result().generation != b""

    def release(self) -> None:
        """Removes the lock if this process still has it."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join(5)  # a renewal may hang
        # A lock that stays delays the next trainer by DEAD_SECONDS.
        with contextlib.suppress(Exception):
            content, version = self.read()
            if (holder := parse(content)) and holder.token == self._holder.token:
                self.swap(version, None)

    def renew(self) -> None:
        """Writes the lock anew. Raises StorageFault: another trainer took this one for dead."""
        content, version = self.read()
        holder = parse(content)
        if holder is None or holder.token != self._holder.token:
            raise errors.StorageFault(f"ending: this process lost its lock; {self._who(holder)}")
        self._holder = msgspec.structs.replace(self._holder, renewed=self._holder.renewed + 1)
        self.swap(version, self._holder)

    def _renew_always(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            try:
                self.renew()
            except errors.StorageFault as error:
                self._released.set()
                ending.leave(error.status, str(error))
            except Exception:  # a network that is down, a full disk: the next save says so
                continue

    def _who(self, holder: Holder | None) -> str:
        if holder is None:
            return f"{self._workdir}: another process trains there"
        return f"{self._workdir}: process {holder.pid} on {holder.host} trains there, since {holder.began}"

    def _take(self) -> None:
        seen, until = None, 0.0  # the lock of a process that cannot be looked up
        while True:
            content, version = self.read()
            holder = parse(content)
            lives = holder.lives() if holder else None
            if content is not None and lives is None and seen is None:
                seen, until = content, time.monotonic() + DEAD_SECONDS
                waits = f"waiting up to {DEAD_SECONDS} s for a sign of life"
                print(f"{self._who(holder)}, or is dead: {waits}", file=sys.stderr, flush=True)
            if lives or (lives is None and content not in (None, seen)):
                raise errors.UserError(
                    f"{self._who(holder)}; expected no other: end it, or take another --workdir"
                    f" (its lock: {self._workdir / FILE})"
                )
            is_free = content is None or lives is False or time.monotonic() > until
            if not is_free:
                time.sleep(1)
            elif self.swap(version, self._holder):
                return


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[Lock]:
    """Holds the lock of `workdir`, which is made if it does not exist.

    Raises:
      UserError: another process has it, or the workdir cannot be made or written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = Lock(workdir)
    except errors.UserError:
        raise
    except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
        got = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise errors.UserError(f"--workdir: {workdir}: got {got}, expected a writable folder") from None
    try:
        yield lock
    finally:
        lock.release()
