"""Parts of shoes, which stand with the toe on the left, and of bags."""

from collections.abc import Iterator

import numpy as np
from grain_jax.data.fetch.outline import SIDE, Outline, Part


def of_shoe(outline: Outline, *, sandal: bool) -> Iterator[Part]:
    """Heel or sole; of a sandal its straps, of other shoes shaft and toe."""
    yield from _heel(outline)
    if sandal:
        yield from _straps(outline)
    else:
        yield from _shaft(outline)
        yield from _toe(outline)


def _heel(outline):
    """A high heel: sole and ground are 4 rows or more apart before it; thin: up to 3 columns. A flat sole: up to 1 row."""
    columns = np.flatnonzero(outline.mask.any(0))
    if len(columns) < 20:
        return
    lowest = SIDE - 1 - outline.mask[::-1].argmax(0)
    gap = np.where(outline.mask.any(0), outline.bottom - lowest, SIDE)  # rows above the ground
    bottom = outline.bottom
    arch = gap[8:24][gap[8:24] < SIDE].max(initial=0)
    back = 18 + np.flatnonzero(gap[18:] <= 1)
    if arch >= 4 and len(back):
        first, last = back[0], back[-1] + 1
        while first > 9 and gap[first - 1] <= 2:
            first -= 1
        if last - first <= 8:  # a wider one is a wedge
            said = "a high thin heel" if last - first <= 3 else "a high block heel"
            yield Part((first - 1, bottom - arch - 1, last + 1, bottom + 1), said)
    elif gap[columns[0] + 3 : columns[-1] - 2].max() <= 1:
        said = "a sole flat on the ground"
        yield Part((columns[0], bottom - 2, columns[-1] + 1, bottom + 1), said)


def _shaft(outline):
    """A tall shaft: the shoe has 16 rows or more and its back is broad on top. A low cut: it has up to 13."""
    top, height = outline.top, outline.height
    back = outline.mask[top : top + 6, 10:]
    if height >= 16 and back[1:].sum(1).min() >= 6 and back[1:].mean() >= 0.35:
        columns = np.flatnonzero(back.any(0)) + 10
        box = columns[0], top, columns[-1] + 1, top + round(height * 0.55)
        yield Part(box, "a tall shaft")
    elif height <= 13:
        yield Part((12, top, SIDE, top + 5), "a low cut")


def _empty(mask):
    """Bool [28, 28]: empty, with the thing above and below; and the share of the outline that is."""
    inside = (np.cumsum(mask, 0) > 0) & (np.cumsum(mask[::-1], 0)[::-1] > 0)
    return inside & ~mask, (inside & ~mask).sum() / inside.sum()


def _straps(outline):
    """Open straps: an eighth or more of the outline is empty."""
    empty, share = _empty(outline.mask)
    if share >= 0.12:
        rows, columns = np.nonzero(empty)
        box = columns.min() - 2, rows.min() - 2, columns.max() + 3, rows.max() + 2
        yield Part(box, "open straps")


def _toe(outline):
    """A closed toe: the front of the shoe is solid."""
    first = np.flatnonzero(outline.mask.any(0))[0]
    front = slice(first, first + 11)
    empty, _ = _empty(outline.mask)
    if empty[:, front].sum() <= 4:
        rows = np.flatnonzero(outline.mask[:, front].any(1))
        yield Part((first, rows[0], first + 11, rows[-1] + 1), "a closed toe")


def of_bag(outline: Outline) -> Iterator[Part]:
    """A handle: ink with an empty middle above the body, long from 9 rows on. The body: wide and flat, or tall."""
    top, bottom = outline.top, outline.bottom
    broad = 0.7 * np.percentile(outline.width[top : bottom + 1], 90)
    solid = outline.mask.sum(1) >= broad
    start = next((row for row in range(top, bottom - 3) if solid[row : row + 4].all()), None)
    if start is None:
        return
    above = outline.mask[top:start]
    if start - top >= 3 and (above.sum(1) < outline.width[top:start]).sum() >= 2:
        columns = np.flatnonzero(above[:-2].any(0))  # the last rows may be the rim of the bag
        said = "a long handle" if start - top >= 9 else "a short handle"
        yield Part((columns[0], top, columns[-1] + 1, start + 1), said)
    rows = slice(start, bottom + 1)
    left, right = np.median(outline.left[rows]), np.median(outline.right[rows])
    ratio = (right - left) / (bottom + 1 - start)
    if ratio >= 1.4 or ratio <= 1.1:
        said = "a wide flat body" if ratio >= 1.4 else "a tall body"
        yield Part((left, start, right, bottom + 1), said)
