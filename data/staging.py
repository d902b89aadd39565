"""Replaces a record set atomically: the new set is written beside the old one, then exchanged by renaming.

A build that is killed leaves the old set or the new one. Between the two renames neither is in its place;
then `recover` puts the old one back. One build at a time writes a set: `locked`.
"""

import contextlib
from collections.abc import Iterator

import filelock
from etils import epath

from grain_jax.core import atomic, errors


class BusyError(errors.UserError):
    """Another process writes there."""


@contextlib.contextmanager
def locked(target: epath.Path, flag: str = "--name") -> Iterator[None]:
    """Keeps other writers of `target` (OUTPUT/NAME/VERSION of a set) out while the block runs.

    It is a lock of this machine's system, which ends with the process. Object stores have none. `flag` is
    what to change to write elsewhere. Raises BusyError: another process has it.
    """
    if "://" in str(target):
        yield
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = target.parent / f"incomplete.lock_{target.name}"
    try:
        lock = filelock.FileLock(mark).acquire(timeout=0)
    except filelock.Timeout:
        advice = f"wait for it, or give another {flag}"
        raise BusyError(f"{target}: in use by another process; {advice}") from None
    with lock:
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)
            with contextlib.suppress(OSError, ValueError):  # it is not empty
                target.parent.rmdir()


def recover(target: epath.Path) -> None:
    """Undoes an interrupted exchange: puts the old set of `target` (OUTPUT/NAME/VERSION) back."""
    old = target.parent / f"incomplete.old_{target.name}"
    if old.exists() and not target.exists():
        old.rename(target)


@contextlib.contextmanager
def replacing(target: epath.Path) -> Iterator[epath.Path]:
    """Gives a folder to write NAME/VERSION in, which replaces `target`, OUTPUT/NAME/VERSION, at the end.

    Left-overs of killed builds of the same set are deleted. If the block raises, `target` stays as it was.
    """
    new, old = (target.parent / f"incomplete.{x}_{target.name}" for x in ("new", "old"))
    recover(target)
    new.rmtree(missing_ok=True)
    old.rmtree(missing_ok=True)
    new.mkdir(parents=True)
    try:
        yield new
        atomic.replace(new / target.parent.name / target.name, target, old)
    finally:
        recover(target)
        new.rmtree(missing_ok=True)
        old.rmtree(missing_ok=True)
