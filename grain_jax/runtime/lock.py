"""Allows one trainer per workdir: the lock `WORKDIR/trainer.lock` names the process that trains there.

A second trainer is refused while the first lives. On the same boot of the same machine and container the process is
looked up. Elsewhere (another host, an object store) a trainer lives as long as it renews its lock, every
RENEW_SECONDS; a lock that does not change for DEAD_SECONDS belongs to a dead trainer. The second trainer measures
these by its own clock, so the clocks of two machines may differ.

The lock is made by an exclusive link in a folder, and replaced by conditional writes of TensorStore, as all of it is
in an object store. Where two hosts mount a folder without file locks and replace the same dead lock within
SETTLE_SECONDS, the later one wins and the other ends at its next renewal, as does a trainer that was suspended for
longer than DEAD_SECONDS and replaced meanwhile.
"""

import contextlib
import dataclasses
import datetime
import json
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
SETTLE_SECONDS = 2.0
_RELEASE_SECONDS = 5  # for a renewal under way, which a hung disk may block


class Held(errors.UserError):
    """Another process trains in the workdir; the message names it."""


class Lost(errors.UserError):
    """Another trainer has the lock: it took this one for dead."""

    status = 1


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
      host, pid: of the process.
      began: time and date, for people.
      place: boot and container, in which `pid` is unique; "" where unknown.
      started: start of the process in ticks since the boot, because a pid may be used again.
      token: of this lock.
      renewed: number of renewals.
    """

    host: str
    pid: int
    began: str
    place: str
    started: int
    token: str
    renewed: int = 0

    def lives(self) -> bool | None:
        """Whether its process exists; None where it cannot be looked up."""
        if not self.place or self.place != _place():
            return None
        return _started(self.pid) == self.started


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return ""


def _started(pid: int) -> int | None:
    """The start of a process, in ticks; None where it does not exist or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _myself() -> Holder:
    began = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
    pid, token = os.getpid(), secrets.token_hex(8)
    return Holder(socket.gethostname(), pid, began, _place(), _started(pid) or 0, token)


def _parse(content: bytes) -> Holder | None:
    """The holder that a lock names; None where the content is no lock."""
    try:
        return msgspec.json.decode(content, type=Holder)
    except (msgspec.MsgspecError, ValueError):
        return None


class _Store:
    """The lock in an object store, by conditional writes of TensorStore."""

    def __init__(self, url: str):
        import tensorstore  # Orbax's; a second to import

        self._store = tensorstore.KvStore.open(url.rstrip("/") + "/").result()

    def read(self) -> tuple[bytes | None, bytes]:
        """(content of the lock or None, its version)."""
        found = self._store.read(FILE).result()
        return found.value if found.state == "value" else None, found.stamp.generation

    def swap(self, version: bytes, content: bytes | None) -> bool:
        """Replaces that version by `content` (None removes it); False where another process was faster."""
        return self._store.write(FILE, content, if_equal=version).result().generation != b""


class _Folder(_Store):
    """The lock in a folder: TensorStore compares under a file lock, which a mount may not share with other hosts."""

    def __init__(self, folder: Path):
        self._path = folder.resolve() / FILE
        super().__init__(self._path.parent.as_uri())

    def swap(self, version: bytes, content: bytes | None) -> bool:
        if content is None or self._path.exists():
            return super().swap(version, content)
        new = self._path.with_name(f"{FILE}.{secrets.token_hex(4)}")
        try:
            new.write_bytes(content)
            try:
                self._path.hardlink_to(new)  # exclusive on every host
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                return super().swap(version, content)
        finally:
            new.unlink(missing_ok=True)
        return True


class Lock:
    """The lock of this process, renewed by a thread until `release`.

    Args:
      workdir: of the run.
      storage: of the lock.
      holder: this process.
    """

    def __init__(self, workdir: epath.Path, storage: _Store, holder: Holder):
        self._workdir, self._storage, self._holder = workdir, storage, holder
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._renewed_at = time.monotonic()
        ending.at_end(self.release)
        threading.Thread(target=self._renew_always, name="trainer.lock", daemon=True).start()

    def check(self) -> None:
        """Raises Lost where another trainer has the lock; reads the storage only where a renewal is overdue."""
        if time.monotonic() - self._renewed_at > 2 * RENEW_SECONDS:
            try:
                self._renew()
            except Lost:
                raise
            except Exception:  # the storage does not answer: the thread reports it
                self._renewed_at = time.monotonic()

    def release(self) -> None:
        """Removes the lock where it is still that of this process."""
        if self._released.is_set():
            return
        self._released.set()
        ending.forget(self.release)
        if not self._lock.acquire(timeout=_RELEASE_SECONDS):
            return
        # A lock that stays delays the next trainer by DEAD_SECONDS.
        with contextlib.suppress(Exception):
            content, version = self._storage.read()
            if content is not None and self._is_mine(content):
                self._storage.swap(version, None)
        self._lock.release()

    def _is_mine(self, content: bytes) -> bool:
        holder = _parse(content)
        return holder is not None and holder.token == self._holder.token

    def _renew_always(self) -> None:
        told = False
        while not self._released.wait(RENEW_SECONDS):
            try:
                self._renew()
            except Lost as error:
                ending.leave(error.status, str(error))
            except Exception as error:  # a network that is down: perhaps the next time
                if errors.is_full_disk(error) or told:
                    continue  # the next save tells of a full disk
                what = f"{self._workdir / FILE}: not renewed: {error}"
                print(what, file=sys.stderr, flush=True)
                told = True

    def _renew(self) -> None:
        with self._lock:
            if self._released.is_set():
                return
            content, version = self._storage.read()
            if content is not None and not self._is_mine(content):
                raise Lost(
                    f"ending: {_who(self._workdir, _parse(content))}, which took this one for dead"
                )
            if content is None and not self._workdir.exists():
                raise Lost(
                    f"ending: {self._workdir}: the folder was removed while the run was using it"
                )
            self._holder = dataclasses.replace(self._holder, renewed=self._holder.renewed + 1)
            if self._storage.swap(version, _bytes(self._holder)):
                self._renewed_at = time.monotonic()


def _bytes(holder: Holder) -> bytes:
    return (json.dumps(dataclasses.asdict(holder)) + "\n").encode()


def _who(workdir: epath.Path, holder: Holder | None) -> str:
    if holder is None:
        return f"{workdir}: another process trains there"
    return f"{workdir}: process {holder.pid} on {holder.host} trains there, since {holder.began}"


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[Lock]:
    """Holds the lock of `workdir`, which is made if it does not exist, and removed if nothing is written there.

    Raises:
      Held: another process has it.
      UserError: the workdir cannot be made or written.
    """
    new = "://" not in str(workdir) and not workdir.exists()
    mark = take(workdir)
    try:
        yield mark
    finally:
        mark.release()
        if new:
            with contextlib.suppress(OSError):  # it holds something
                Path(workdir).rmdir()


def take(workdir: epath.Path) -> Lock:
    """Takes the lock of `workdir`. Raises as `held`."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        remote = "://" in str(workdir)
        storage = _Store(str(workdir)) if remote else _Folder(Path(workdir))
        return Lock(workdir, storage, _take(workdir, storage))
    except errors.UserError:
        raise
    except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
        what = "a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", None)
        raise errors.UserError(
            f"--workdir: {workdir}: got {what or ' '.join(str(error).split())}, expected a folder that can be"
            " written"
        ) from None


def _take(workdir: epath.Path, storage: _Store) -> Holder:
    me = _myself()
    seen: bytes | None = None  # of a process that cannot be looked up
    since = 0.0
    while True:
        content, version = storage.read()
        holder = _parse(content) if content is not None else None
        lives = False if content is None else holder and holder.lives()
        if lives is None and seen is None:
            seen, since = content, time.monotonic()
            waits = f"waiting up to {DEAD_SECONDS} s for a sign of life"
            print(f"{_who(workdir, holder)}, or is dead: {waits}", file=sys.stderr, flush=True)
        elif lives is None and content != seen:
            lives = True  # it was renewed
        elif lives is None and time.monotonic() - since > DEAD_SECONDS:
            lives = False
        if lives:
            raise Held(
                f"{_who(workdir, holder)}; expected no other: end it, or take another --workdir"
                f" (its lock: {workdir / FILE})"
            )
        if lives is None:
            time.sleep(1)
        elif not storage.swap(version, _bytes(me)):
            time.sleep(0.01)
        elif seen is None:
            return me
        else:  # of another host, which may have taken it over too
            time.sleep(SETTLE_SECONDS)
            if storage.read()[0] == _bytes(me):
                return me
            seen = None
