"""Parts of garments that hang upright, seen from the front."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from grain_jax.data.fetch.outline import SIDE, Outline, Part

_SEAM = 0.12  # depth of a valley between sleeve and body, as a share of the darkness around it
_LONG, _SHORT, _NONE, _UNKNOWN = "a long sleeve", "a short sleeve", "a bare armhole", ""


class Sleeves(NamedTuple):
    """The look of the sleeves ("" where it cannot be told), the row after their end, the columns of the body."""

    look: str
    end: int = 0
    body: tuple[int, int] = (0, 0)


def of_top(ink: np.ndarray, outline: Outline, *, closure: bool) -> Iterator[Part]:
    """Sleeves, neck, body, hem; with `closure` also buttons or a zip."""
    sleeves = measured_sleeves(ink, outline)
    yield from _sleeves(sleeves, outline)
    yield from _neck(sleeves, outline)
    yield from _body(sleeves, outline)
    if closure:
        yield from _closure(ink, outline)


def measured_sleeves(ink: np.ndarray, outline: Outline) -> Sleeves:
    """The sleeves of a garment, both sides taken together.

    Long: a seam between sleeve and body in the lower half, steady from row to row, or an outline that widens from the
    shoulder and stays wide. Short: the outline steps in by 1.5 pixels a side, and stays so. None: narrow, without a
    seam or a step.
    """
    top, bottom, left, right = outline.top, outline.bottom, outline.left, outline.right
    if outline.height <= 20 or not outline.mask[top : bottom + 1].any(1).all():
        return Sleeves(_UNKNOWN)
    half = outline.width / 2
    depth, column = _seams(ink, outline)
    low = slice(top + 13, min(top + 22, bottom + 1))
    seam = np.median(depth[low], axis=0)
    steps = np.median(np.abs(np.diff(column[low], axis=0)), axis=0)
    if seam.min() >= _SEAM and seam.mean() >= 0.2 and steps.max() <= 1:
        falls = (row for row in range(top + 17, bottom - 1) if half[row] - half[row + 2] >= 1.5)
        deep = depth[low] >= _SEAM
        first, last = (int(np.median(column[low, side][deep[:, side]])) for side in (0, 1))
        return Sleeves(_LONG, min(next(falls, bottom) + 2, bottom + 1), (first, last + 1))
    drop, row = max(
        (half[row] - half[row + 2], row) for row in range(top + 4, min(top + 17, SIDE - 3))
    )
    after = slice(row + 2, min(row + 6, bottom))
    if drop >= 1.5 and half[after].size and half[after].max() <= half[row] - 1:
        body = int(np.median(left[after])), int(np.median(right[after]))
        return Sleeves(_SHORT, row + 1, body) if row < top + 12 else Sleeves(_UNKNOWN)
    elbow, narrowest = np.median(half[low]), half[top + 7 : top + 16].min()
    if elbow >= 8.5 and half[top + 2] <= elbow - 2 and narrowest >= half[top + 6] - 0.5:
        inset = round(elbow * 0.35)
        body = int(np.median(left[low])) + inset, int(np.median(right[low])) - inset
        return Sleeves(_LONG, bottom - 1, body)
    if seam.max() < _SEAM and narrowest <= 6.5 and half[top + 3 : top + 9].max() <= 7.5:
        return Sleeves(_NONE, top + 9, (left[top + 10] + 2, right[top + 10] - 2))
    return Sleeves(_UNKNOWN)


def _seams(ink, outline):
    """[28, 2] each: for every row and side the depth of the deepest valley between the edge and the axis, and its column."""
    depth, column = np.zeros((SIDE, 2)), np.zeros((SIDE, 2), int)
    middle = outline.middle
    for row in range(outline.top, outline.bottom + 1):
        sides = (outline.left[row], middle - 2), (middle + 3, outline.right[row])
        for side, (first, last) in enumerate(sides):
            values = ink[row, first:last].astype(float)
            if len(values) < 3:
                continue
            before = np.maximum.accumulate(values)[:-2]
            after = np.maximum.accumulate(values[::-1])[::-1][2:]
            valley = np.minimum(before, after) - values[1:-1]
            depth[row, side] = valley.max() / max(np.median(values), 30.0)
            column[row, side] = first + 1 + valley.argmax()
    return depth, column


def _sleeves(sleeves, outline):
    if sleeves.look == _UNKNOWN:
        return
    rows = slice(outline.top, sleeves.end)
    low, high = outline.left[rows].min(), outline.right[rows].max()
    first, last = sleeves.body
    yield Part((low, outline.top + 1, max(first, low + 2), sleeves.end), sleeves.look)
    yield Part((min(last, high - 2), outline.top + 1, high, sleeves.end), sleeves.look)


def _neck(sleeves, outline):
    """A deep neckline: the middle begins 3 rows or more below the shoulders. A collar: narrow, above sleeves."""
    top, middle = outline.top, outline.middle
    columns = outline.mask[:, middle - 1 : middle + 2]
    if not columns.any(0).all():
        return
    depth = int(np.median(columns.argmax(0))) - top
    shoulders = outline.mask[top : top + 3].any(0)
    if depth >= 3 and shoulders[: middle - 1].any() and shoulders[middle + 2 :].any():
        row = outline.mask[top + 1]
        first = middle - int(row[middle::-1].argmax()) if row[:middle].any() else middle - 2
        last = middle + int(row[middle:].argmax()) if row[middle:].any() else middle + 2
        yield Part((first, top, last + 1, top + depth + 1), "a deep neckline")
    elif depth <= 1 and sleeves.look in (_LONG, _SHORT):  # straps look like a collar
        first, last = outline.left[top + 1], outline.right[top + 1]
        if 3 <= last - first <= 8 and outline.left[top + 4] <= first - 2:
            yield Part((first - 1, top, last + 1, top + 5), "a high collar")


def _body(sleeves, outline):
    """A slim or wide body between the sleeves; a flared or straight hem."""
    top, bottom = outline.top, outline.bottom
    if outline.height <= 24 or sleeves.look == _UNKNOWN:
        return
    first, last = sleeves.body
    if sleeves.look != _LONG:
        rows = slice(top + 10, top + 18)
        first, last = np.median(outline.left[rows]), np.median(outline.right[rows])
    if last - first <= 10 or last - first >= 14:
        said = "a slim body" if last - first <= 10 else "a wide body"
        yield Part((first, top + 3, last, bottom + 1), said)
    if sleeves.look == _LONG:
        return
    waist = np.percentile(outline.width[top + 8 : top + 17], 15)
    hem = np.median(outline.width[bottom - 4 : bottom])
    if hem >= 1.3 * waist or hem <= 1.1 * waist:
        rows = slice(bottom - 5, bottom + 1)
        said = "a flared hem" if hem > 1.1 * waist else "a straight hem"
        yield Part(
            (outline.left[rows].min(), bottom - 5, outline.right[rows].max(), bottom + 1), said
        )


def _closure(ink, outline):
    """Buttons or a zip: a column in the middle that differs from both neighbours, the same way all down the body."""
    rows = ink[outline.top + 6 : outline.bottom - 2].astype(float)
    if len(rows) < 12:
        return
    best, at = 0.0, 0
    for column in range(outline.middle - 2, outline.middle + 2):
        for apart in (2, 3):
            sides = rows[:, [column]] - rows[:, [column - apart, column + apart]]
            means = sides.mean(0)
            nearer = abs(means).min() if means[0] * means[1] > 0 else 0.0
            steady = nearer / (sides.mean(1).std() + 6.0)
            if nearer >= 7 and steady > best:
                best, at = steady, column
    if best >= 0.9:
        yield Part((at - 1, outline.top + 3, at + 2, outline.bottom), "a closure down the front")


def of_trousers(outline: Outline) -> Iterator[Part]:
    """Two legs, from the row below which a gap stays open between them; wide: over 4 pixels."""
    if outline.height <= 24:
        return
    start = outline.middle - 2
    gap = ~outline.mask[:, start : start + 5]
    joined = [row for row in range(outline.top + 4, outline.bottom + 1) if not gap[row].any()]
    crotch = joined[-1] + 1 if joined else outline.top + 4
    if outline.bottom - crotch < 6:
        return
    rows = slice(crotch, outline.bottom)
    first = start + gap[rows].argmax(1)
    last = start + 5 - gap[rows, ::-1].argmax(1)
    left, right = outline.left[rows], outline.right[rows]
    wide = np.median(np.concatenate([first - left, right - last])) > 4
    said = "a wide leg" if wide else "a narrow leg"
    low, high = left.min(), right.max()
    yield Part((low, crotch, max(np.median(first), low + 1), outline.bottom + 1), said)
    yield Part((min(np.median(last), high - 1), crotch, high, outline.bottom + 1), said)
