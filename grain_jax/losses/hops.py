"""The path of the ring through a TPU slice: along links.

A mesh numbers chips row by row, and no link joins the end of one row to the start of the next: libtpu then
lets nothing run beside any hop. The same holds for a wrap-around link (libtpu 0.0.42.1, v5e:16x16). Along a
closed path of neighbours all hops run beside work.
"""

import numpy as np


def along_links(rings: np.ndarray) -> tuple[int, ...]:
    """A path through the positions of a ring in which each device is a neighbour of the next, slice by slice.

    Args:
      rings: devices [rings, positions]; all rings go the same way, as a permutation over a mesh axis does.

    Returns:
      The positions along the path. () if the devices have no coordinates, a slice is no full grid of an even
      number of chips, or the same path does not serve all rings.
    """
    if any(getattr(device, "coords", None) is None for device in rings.flat):
        return ()
    index = lambda device, name: getattr(device, name, 0) or 0
    numbers = lambda x: (index(x, "slice_index"), *x.coords, index(x, "core_on_chip"))
    coordinates = np.array([[numbers(device) for device in ring] for ring in rings])
    path = []
    for number in np.unique(coordinates[0, :, 0]):
        in_slice = np.flatnonzero(coordinates[0, :, 0] == number)
        loop = in_slice[_closed_path(coordinates[0, in_slice, 1:])].tolist()
        steps = np.abs(np.diff(coordinates[:, [*loop, *loop[:1]]], axis=1))
        if not loop or (steps != steps[0]).any():
            return ()
        path += loop
    return tuple(path)


def _closed_path(coordinates: np.ndarray) -> np.ndarray:
    """Indices of the chips [n, axes] along a closed path of neighbours; empty without a full, even grid."""
    none = np.zeros(0, int)
    numbers = [np.unique(axis, return_inverse=True)[1] for axis in coordinates.T]
    grid = np.full([n.max() + 1 for n in numbers], -1)
    grid[tuple(numbers)] = np.arange(len(coordinates))
    if grid.size != len(coordinates) or (grid < 0).any():
        return none
    even = [axis for axis, size in enumerate(grid.shape) if size % 2 == 0]
    if not even:
        return np.zeros(1, int) if grid.size == 1 else none
    rows = np.moveaxis(grid, max(even, key=grid.shape.__getitem__), 0)
    rows = np.stack([_snake(row) for row in rows])
    if rows.shape[1] == 1:
        return rows[:, 0]  # closed by a torus alone
    # Out through all rows but for their first chip, home through the first chips.
    out = [row[:0:-1] if number % 2 else row[1:] for number, row in enumerate(rows)]
    return np.concatenate([rows[0, :1], *out, rows[:0:-1, 0]])


def _snake(grid: np.ndarray) -> np.ndarray:
    """All points of a grid, each a neighbour of the one before it."""
    if grid.ndim == 1:
        return grid
    lines = [_snake(part)[:: -1 if number % 2 else 1] for number, part in enumerate(grid)]
    return np.concatenate(lines)
