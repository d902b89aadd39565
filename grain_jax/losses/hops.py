"""The order in which columns travel round the devices: along the links of a TPU's torus.

A mesh lays many slices row by row: from the last chip of a row to the first of the next there is no link, and libtpu
then lets nothing run beside any hop; nor does it where a hop goes over a wrap-around link (libtpu 0.0.42.1, v5e:16x16).
Along a closed path of neighbours in the grid all hops run beside work. Several slices have a path each: a path over all
of them would send every block through the few chips between two slices.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def along_links(rings: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Closed paths through the positions of a ring, one a slice, in which each device is a neighbour of the next.

    Args:
      rings: devices [rings, positions]; all rings go the same way, as a permutation over a mesh axis does.

    Returns:
      The positions along each path, all of one length; () where the devices have no coordinates, slices are no
      equal grids, or the same paths do not serve all rings.
    """
    if any(getattr(device, "coords", None) is None for device in rings.flat):
        return ()
    places = [[_place(device) for device in ring] for ring in rings]
    loops = _loops(places[0])
    for loop in loops:
        if any(not _same_steps(loop, places[0], ring) for ring in places[1:]):
            return ()
    return loops


def _place(device: Any) -> tuple[int, ...]:
    """(slice, coordinates of the chip, core)."""
    slice_index = getattr(device, "slice_index", 0) or 0
    return (slice_index, *device.coords, getattr(device, "core_on_chip", 0) or 0)


def _loops(places: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The positions along a closed path through each slice; () where a slice is no full grid."""
    loops = []
    for number in sorted({place[0] for place in places}):
        mine = [i for i, place in enumerate(places) if place[0] == number]
        path = _closed_path([places[i][1:] for i in mine])
        if path is None:
            return ()
        loops.append(tuple(mine[i] for i in path))
    return tuple(loops) if len({len(loop) for loop in loops}) == 1 else ()


def _closed_path(places: Sequence[tuple[int, ...]]) -> list[int] | None:
    """Indices of the chips of a grid along a closed path of neighbours (None: no full grid, or an odd number)."""
    axes = [sorted({place[a] for place in places}) for a in range(len(places[0]))]
    at = {tuple(axes[a].index(c) for a, c in enumerate(p)): i for i, p in enumerate(places)}
    sizes = [len(axis) for axis in axes]
    if len(at) != len(places) or len(places) != np.prod(sizes):
        return None
    # Rows along the longest even axis; a row goes through the other axes like a snake, which makes of them one.
    even = [a for a, size in enumerate(sizes) if size % 2 == 0]
    if not even:
        return [0] if len(places) == 1 else None
    down = max(even, key=lambda a: sizes[a])
    others = [a for a in range(len(sizes)) if a != down]
    row = _snake([sizes[a] for a in others])
    points = []
    if len(row) == 1:
        points = [(n, row[0]) for n in range(sizes[down])]  # closed by a torus alone
    else:  # out through all rows but for their first chip, home through the first chips
        points = [(0, row[0])]
        for n in range(sizes[down]):
            points += [(n, place) for place in (row[1:] if n % 2 == 0 else row[:0:-1])]
        points += [(n, row[0]) for n in range(sizes[down] - 1, 0, -1)]
    path = []
    for n, place in points:
        whole = dict(zip(others, place)) | {down: n}
        path.append(at[tuple(whole[a] for a in range(len(sizes)))])
    return path


def _snake(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All points of a grid, each a neighbour of the one before it."""
    out: list[tuple[int, ...]] = [()]
    for size in reversed(sizes):
        ways = (out, out[::-1])
        out = [(n, *rest) for n in range(size) for rest in ways[n % 2]]
    return out


def _same_steps(order, first, other) -> bool:
    """Whether the order takes the same steps through another ring, so that it follows links there as well."""
    steps = lambda places: np.diff([places[i] for i in (*order, order[0])], axis=0)
    return bool((np.abs(steps(first)) == np.abs(steps(other))).all())
