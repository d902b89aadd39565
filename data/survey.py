"""The first pass of grain-jax build: every line is checked and every image decoded, before anything is written."""

import array
import collections
import functools
import json
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from typing import NamedTuple

from etils import epath

from grain_jax.core import atomic, errors, printable, progress
from grain_jax.data import example, parallel

ReadLines = Callable[[epath.Path], Iterable[example.Line]]


class BuildError(errors.UserError):
    """The set cannot be built from this input; the message is one line."""


class Lines(NamedTuple):
    """The lines of a build and their images; see `grain-jax build`."""

    path: epath.Path
    folder: epath.Path  # of the images
    orientation: str  # of the images, as of `images.decode_image`
    workers: int  # processes
    read: ReadLines  # gives the lines, with their images where these are no files

    def map(self, function: Callable, among: Container[int] | None = None, **named) -> Iterator:
        """`function` of `example` of each line, or of those with the numbers `among`, in order."""
        lines = (line for line in self.read(self.path) if among is None or line.number in among)
        of_line = functools.partial(
            function, folder=str(self.folder), orientation=self.orientation, **named
        )
        return parallel.ordered_map(of_line, lines, workers=self.workers)


class Survey:
    """The result of the first pass: the good lines, and the faults of the others."""

    def __init__(self, file_name: str):
        self.file_name = file_name
        self.ids: dict[int, str] = {}  # line -> id, of the good lines
        self.faults: list[tuple[int, str]] = []  # (line, what)
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
        """Counts a line; its faults go to stderr at once."""
        self.lines += 1
        self.turned += verdict.turned
        self.unknown_keys.update(verdict.unknown_keys)
        faults = list(verdict.faults)
        if not faults:
            identity = verdict.id
            if identity is None:  # its image's path, unless another line has that image too
                identity = verdict.image
                if identity in self._line_of_id:
                    identity = f"{verdict.image}#{verdict.number}"
            if identity in self._line_of_id:
                faults = [
                    f"id: got {json.dumps(identity)}, which line {self._line_of_id[identity]} has"
                    " already, expected one of its own"
                ]
        for fault in faults:
            self.faults.append((verdict.number, fault))
            line = printable.plain(f"{self.file_name}:{verdict.number}: {fault}")
            print(line, file=sys.stderr)
        if faults:
            return
        self.ids[verdict.number] = identity
        self.fingerprints.extend(verdict.fingerprint)
        self._line_of_id[identity] = verdict.number
        self.image_bytes += verdict.image_bytes
        self.regions.append(verdict.regions)
        self.negatives += verdict.negatives
        self.boxes_clipped += verdict.boxes_clipped

    def summary(self) -> str:
        """One line about all that was left out or changed."""
        parts = [f"{self.faulty_lines} of {self.lines} lines faulty ({len(self.faults)} faults)"]
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
        """One JSON object a fault: file, line, fault."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(
            path,
            "".join(
                json.dumps({"file": self.file_name, "line": line, "fault": fault}) + "\n"
                for line, fault in self.faults
            ),
        )


def take(lines: Lines, total: int) -> Survey:
    """Checks all lines, `total` in number, and decodes all images."""
    found = Survey(str(lines.path))
    for verdict in progress.over(lines.map(example.check), total=total, what="checking"):
        found.add(verdict)
    return found
