"""Replaces a record set by one that is complete: written beside it, then exchanged by renaming.

A build that is killed leaves the old set or the new one; between the two renames neither stands in its
place, and `recover` puts the old one back.
"""

import contextlib
from collections.abc import Iterator

from etils import epath


def recover(target: epath.Path) -> None:
    """Undoes an exchange that was cut short: the older set of `target` (OUTPUT/NAME/VERSION) is back."""
    old = _old(target)
    if old.exists() and not target.exists():
        old.rename(target)


@contextlib.contextmanager
def replacing(target: epath.Path) -> Iterator[epath.Path]:
    """Gives a folder to write NAME/VERSION in; that then takes the place of `target`, OUTPUT/NAME/VERSION.

    What killed builds of this very set left is deleted first. If the block raises, `target` stays as
    it was.
    """
    name, version = target.parent.name, target.name
    recover(target)
    if target.parent.exists():
        for left_over in target.parent.glob(f"incomplete.*_{version}"):
            left_over.rmtree()
    new = target.parent / f"incomplete.new_{version}"
    new.mkdir(parents=True)
    try:
        yield new
        old = _old(target)
        if target.exists():
            target.rename(old)
        try:
            (new / name / version).rename(target)
        finally:
            recover(target)
        old.rmtree(missing_ok=True)
    finally:
        new.rmtree(missing_ok=True)


def _old(target: epath.Path) -> epath.Path:
    return target.parent / f"incomplete.old_{target.name}"
