"""Divides the images of a build into train and validation, and leaves out duplicates of other sets."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grain_jax.data import duplicates
from grain_jax.data.survey import BuildError, Survey


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
    """Leaves out images that other sets have, and holds out a share of the rest.

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
        line = {"file": found.file_name, "line": lines[index], "id": ids[index]}
        listed.append(line | {"kind": kind, "of": of, "left_out": left_out})

    for other in exclude_duplicates_of:
        known = duplicates.of_set(other, workers=workers)
        exact, near = duplicates.matches(prints, known)
        for index in np.nonzero(near & kept)[0]:
            note(index, "exact" if exact[index] else "near", str(other), True)
        kept &= ~near
    twins = duplicates.earlier_twins(prints)
    for index in np.nonzero((twins >= 0) & kept)[0]:
        note(index, "exact", f"line {lines[twins[index]]}", False)

    aside = kept & (prints[:, 0] < holdout * 2.0**64)
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
    regions = int(np.asarray(found.regions)[kept].sum())
    return Splits(*splits, prints[kept], regions, listed, int((~kept).sum()))
