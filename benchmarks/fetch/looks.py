"""Boxes and words for the parts of a garment, shoe or bag, measured on its picture of 28 x 28 grey values.

The pictures of Fashion-MNIST lie upright on an empty ground, garments from the front, shoes with the toe on the
left. So a part is told by a few measures of the outline and of the grey values in it. Where a measure lies between two
looks, the part is left out.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage

SIDE = 28  # of a picture, in pixels
_INK = 12  # a pixel of at least this darkness belongs to the thing
_SPECK = 0.1  # a piece smaller than this share of the largest is no part of the thing
_LEAST = 30  # pixels of ink that can be measured
_SEAM = 0.12  # depth of a valley between sleeve and body, as a share of the darkness around it
_LONG, _SHORT, _NONE, _UNKNOWN = "a long sleeve", "a short sleeve", "a bare armhole", ""
_TOPS = ("T-shirt", "pullover", "dress", "coat", "shirt")
_CLOSED = ("pullover", "coat", "shirt")  # the folds of the others look like a closure
_SHOES = ("sandal", "sneaker", "ankle boot")


class Part(NamedTuple):
    """A part: (x1, y1, x2, y2) in pixels of the picture, and its description."""

    box_xyxy: tuple[int, int, int, int]
    description: str


class Outline(NamedTuple):
    """Where the thing is. Rows and columns are numbers of pixels, from the top and from the left."""

    mask: np.ndarray  # bool [28, 28]
    top: int  # first row with ink
    bottom: int  # last row with ink
    left: np.ndarray  # int [28], of every row the first column with ink; SIDE where there is none
    right: np.ndarray  # int [28], the column after the last with ink; 0 where there is none

    @property
    def height(self) -> int:
        return self.bottom - self.top + 1

    @property
    def width(self) -> np.ndarray:
        return np.maximum(self.right - self.left, 0)

    @property
    def middle(self) -> int:
        """The column of the axis."""
        rows = slice(self.top, self.bottom + 1)
        return int(np.median((self.left + self.right)[rows]) / 2)


def outline_of(ink: np.ndarray) -> Outline | None:
    """The outline of the largest piece of ink and of those that are not much smaller; None of an empty picture."""
    pieces, count = ndimage.label(ink >= _INK, structure=np.ones((3, 3)))
    if count == 0:
        return None
    sizes = ndimage.sum_labels(ink >= _INK, pieces, np.arange(1, count + 1))
    mask = np.isin(pieces, 1 + np.flatnonzero(sizes >= _SPECK * sizes.max()))
    rows = np.flatnonzero(mask.any(1))
    left = np.where(mask.any(1), mask.argmax(1), SIDE)
    right = np.where(mask.any(1), SIDE - mask[:, ::-1].argmax(1), 0)
    return Outline(mask, int(rows[0]), int(rows[-1]), left, right)


def parts(ink: np.ndarray, kind: str) -> list[Part]:
    """The parts that can be measured in a picture; of one description there are several only of sleeves and legs.

    Args:
      ink: uint8 [28, 28], darkness: 0 = the white ground, as the files of the package store it.
      kind: name of the class; it says which parts to look for, never how one looks.

    Returns: parts whose boxes lie in the picture and are not empty.
    """
    found = outline_of(ink)
    if found is None or found.mask.sum() < _LEAST:
        return []
    inside = []
    for box_xyxy, description in _parts(ink, found, kind):
        x1, y1, x2, y2 = (min(max(int(edge), 0), SIDE) for edge in box_xyxy)
        if x1 < x2 and y1 < y2:
            inside.append(Part((x1, y1, x2, y2), description))
    return inside


def _parts(ink, found, kind) -> Iterator[Part]:
    if kind in _TOPS:
        sleeves = measured_sleeves(ink, found)
        yield from _sleeves(sleeves, found)
        yield from _neck(sleeves, found)
        yield from _body(sleeves, found)
        if kind in _CLOSED:
            yield from _closure(ink, found)
    elif kind in _SHOES:
        yield from _heel(found)
        if kind == "sandal":
            yield from _straps(found)
        else:
            yield from _shaft(found)
            yield from _toe(found)
    elif kind == "trouser":
        yield from _of_trousers(found)
    elif kind == "bag":
        yield from _of_bag(found)
    else:
        raise ValueError(f"kind: got {kind!r}, expected a class of Fashion-MNIST")
    yield from _surface(ink, found, pattern=kind not in _SHOES)


def _surface(ink: np.ndarray, found: Outline, *, pattern: bool) -> Iterator[Part]:
    """Striped across, patterned, or else dark or light; the box is around the whole thing.

    A pattern: grey values differ by 20 from the mean around them. Shoes are too small to tell it from their parts.
    """
    columns = np.flatnonzero(found.mask.any(0))
    box = columns[0], found.top, columns[-1] + 1, found.bottom + 1
    values, inner = ink.astype(float), ndimage.binary_erosion(found.mask)
    if pattern:
        core = ndimage.binary_erosion(inner)
        if core.sum() < _LEAST:
            return
        rough = np.abs(values - ndimage.uniform_filter(values, 3))[core].mean()
        if rough >= 12:
            along = np.abs(np.diff(values, axis=1))[core[:, 1:] & core[:, :-1]]
            across = np.abs(np.diff(values, axis=0))[core[1:] & core[:-1]]
            if min(along.size, across.size) and across.mean() >= 2.2 * along.mean():
                yield Part(box, "a striped surface")
            elif rough >= 20:
                yield Part(box, "a patterned surface")
            return
    mean = values[inner if inner.sum() >= 40 else found.mask].mean()
    if mean >= 170 or mean <= 115:
        yield Part(box, "a dark surface" if mean >= 170 else "a light surface")


class Sleeves(NamedTuple):
    """The look of the sleeves ("" where it cannot be told), the row after their end, the columns of the body."""

    look: str
    end: int = 0
    body: tuple[int, int] = (0, 0)


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


def _of_trousers(outline: Outline) -> Iterator[Part]:
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


def _of_bag(outline: Outline) -> Iterator[Part]:
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
