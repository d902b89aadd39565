"""The first pass of grain-jax build: every line is checked and every image decoded, before anything is written.

Then the images are divided into train and validation, and duplicates of other sets are left out.
"""

import array
import collections
import functools
import json
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from grain_jax.core import atomic, errors, printable, progress
from grain_jax.data import duplicates, example, parallel

MOST_PRINTED = 20  # faults
ReadLines = Callable[[epath.Path], Iterable[example.Line]]


class BuildError(errors.UserError):
    """The set cannot be built from this input; the message is one line."""


class Lines(NamedTuple):
    """The lines of a build and their images; see `grain-jax build`."""

    path: epath.Path
    folder: epath.Path  # of the images
    workers: int  # processes
    read: ReadLines  # gives the lines, with their images where these are no files

    def map(self, function: Callable, among: Container[int] | None = None, **named) -> Iterator:
        """`function` of `example` of each line, or of those with the numbers `among`, in order."""
        lines = (
            line if line.where else line._replace(where=f"{self.path}:{line.number}")
            for line in self.read(self.path)
            if among is None or line.number in among
        )
        of_line = functools.partial(function, folder=str(self.folder), **named)
        return parallel.ordered_map(of_line, lines, workers=self.workers)


class Survey:
    """The result of the first pass: the good lines, and the faults of the others."""

    def __init__(self, file_name: str):
        self.file_name = file_name
        self.ids: dict[int, str] = {}  # line -> id, of the good lines
        self.faults: list[tuple[str, str]] = []  # (where, what)
        self.left_out = self.without_caption = 0  # regions of good lines; good lines
        self.lines = self.image_bytes = self.boxes_clipped = self.negatives = self.turned = 0
        self.regions = array.array("I")  # of each good line
        self.unknown_keys: collections.Counter[str] = collections.Counter()
        self.fingerprints = array.array("Q")  # exact and near, of the good lines in order
        self._line_of_id: dict[str, int] = {}

    @property
    def faulty_lines(self) -> int:
        """Lines with at least one fault."""
        return self.lines - len(self.ids)

    def add(self, verdict: example.Verdict) -> None:
        """Counts a line; the first MOST_PRINTED faults go to stderr at once."""
        self.lines += 1
        self.turned += verdict.turned
        self.unknown_keys.update(verdict.unknown_keys)
        faults, found = list(verdict.faults), verdict.annotation
        if found is not None:
            identity = found.id
            if identity is None:  # its image's path, unless another line has that image too
                identity = found.image
                if identity in self._line_of_id:
                    identity = f"{found.image}#{verdict.number}"
            if identity in self._line_of_id:
                other = (
                    f"which line {self._line_of_id[identity]} has already, expected one of its own"
                )
                faults = [f"id: got {json.dumps(identity)}, {other}"]
        self._list(verdict.where, [*faults, *verdict.left_out])
        if faults:
            return
        self.left_out += len(verdict.left_out)
        self.without_caption += not (found.captions or found.synthetic_caption)
        self.ids[verdict.number] = identity
        self.fingerprints.extend(verdict.fingerprint)
        self._line_of_id[identity] = verdict.number
        self.image_bytes += verdict.image_bytes
        self.regions.append(len(found.regions))
        self.negatives += sum(len(region.negatives) for region in found.regions)
        self.boxes_clipped += verdict.boxes_clipped

    def _list(self, where: str, faults: Iterable[str]) -> None:
        for fault in faults:
            self.faults.append((where, fault))
            if len(self.faults) <= MOST_PRINTED:
                print(printable.plain(f"{where}: {fault}"), file=sys.stderr)

    def summary(self) -> str:
        """One line about all that was left out or changed."""
        more = len(self.faults) - MOST_PRINTED
        shown = f", {more} of them not shown" if more > 0 else ""
        count = f"{len(self.faults)} faults{shown}"
        parts = [f"{self.faulty_lines} of {self.lines} lines faulty ({count})"]
        if self.left_out:
            parts.append(f"{self.left_out} regions left out")
        if self.without_caption:
            parts.append(f"{self.without_caption} images without a caption, with regions alone")
        if self.boxes_clipped:
            parts.append(
                f"{self.boxes_clipped} of {sum(self.regions)} boxes clipped to their image"
            )
        if self.unknown_keys:
            named = ", ".join(
                f"{printable.plain(key, 60)} ({n})" for key, n in self.unknown_keys.most_common()
            )
            parts.append(f"unknown keys kept out: {named}")
        return f"{self.file_name}: " + "; ".join(parts)

    def write_faults(self, path: epath.Path) -> None:
        """One JSON object a fault: where, fault."""
        path.parent.mkdir(parents=True, exist_ok=True)
        faults = ({"where": where, "fault": fault} for where, fault in self.faults)
        atomic.write_text(path, "".join(json.dumps(fault) + "\n" for fault in faults))


def take(lines: Lines, total: int | None) -> Survey:
    """Checks all lines, `total` in number where it is known, and decodes all images."""
    found = Survey(str(lines.path))
    for verdict in progress.over(lines.map(example.check), total=total, what="checking"):
        found.add(verdict)
    return found


class Splits(NamedTuple):
    """The good lines of each split."""

    train: dict[int, str]  # line -> id
    validation: dict[int, str]
    fingerprints: np.ndarray  # uint64 [N, 2] of both
    regions: int  # of both
    duplicates: list[dict]  # a line of duplicates.jsonl each
    left_out: int


def divide(
    found: Survey, *, holdout: float, exclude_duplicates_of: Sequence[str], workers: int
) -> Splits:
    """Leaves out images that other sets have, and holds out a share of the rest; prints how many.

    The split of an image depends on its file only, so it is the same in each run and in each set; but a near copy of
    a held-out image is held out too.

    Args:
      found: the first pass.
      holdout: share of the images for validation.
      exclude_duplicates_of: folders of TFDS sets.
      workers: processes.

    Raises:
      BuildError: nothing is left for one of the splits.
      data.sources.SourceError: one of the other sets is not there.
    """
    lines, ids = list(found.ids), list(found.ids.values())
    prints = duplicates.table(found.fingerprints)
    kept, listed = np.ones(len(lines), bool), []

    def note(index: int, kind: str, of: str, left_out: bool) -> None:
        listed.append({"id": ids[index], "kind": kind, "of": of, "left_out": left_out})

    for other in exclude_duplicates_of:
        known = duplicates.of_set(other, workers=workers)
        exact, near = duplicates.matches(prints, known)
        for index in np.nonzero(near & kept)[0]:
            note(index, "exact" if exact[index] else "near", str(other), True)
        kept &= ~near
    twins = duplicates.earlier_twins(prints)
    for index in np.nonzero((twins >= 0) & kept)[0]:
        note(index, "exact", ids[twins[index]], False)

    aside = kept & (prints[:, 0] < holdout * 2.0**64)
    drawn = int(aside.sum())
    while (more := duplicates.matches(prints, prints[aside])[1] & kept & ~aside).any():
        aside |= more
    splits = [
        {lines[index]: ids[index] for index in np.nonzero(chosen)[0]}
        for chosen in (kept & ~aside, aside)
    ]
    if not splits[0] or (holdout and not splits[1]):
        raise BuildError(
            f"--holdout {holdout:g}, {len(exclude_duplicates_of)} sets excluded: of"
            f" {len(lines)} images {len(splits[0])} are left for train and {len(splits[1])} for"
            " validation, expected at least one; no records were written"
        )
    left_out = int((~kept).sum())
    held_out = len(splits[1])
    why = f"{drawn} by the hash of their file, {held_out - drawn} as near copies of one of these"
    for what, count in (
        ("are of other sets and left out", left_out),
        ("are the file of an earlier line", len(listed) - left_out),
        (f"go to validation: {why}", held_out),
    ):
        if count:
            print(f"{found.file_name}: {count} of {len(lines)} images {what}", file=sys.stderr)
    regions = int(np.asarray(found.regions)[kept].sum())
    return Splits(*splits, prints[kept], regions, listed, left_out)
