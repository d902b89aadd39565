"""The outline of a thing in a picture of 28 x 28 grey values, and a part of it."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

SIDE = 28  # of a picture, in pixels
INK = 12  # a pixel of at least this darkness belongs to the thing
_SPECK = 0.1  # a piece smaller than this share of the largest is no part of the thing


class Part(NamedTuple):
    """A part: (x1, y1, x2, y2) in pixels of the picture, and its description."""

    box_xyxy: tuple[int, int, int, int]
    description: str


class Outline(NamedTuple):
    """Where the thing is. Rows and columns are numbers of pixels, from the top and from the left."""

    mask: np.ndarray  # bool [28, 28]
    top: int  # first row with ink
    bottom: int  # last row with ink
    left: np.ndarray  # int [28], for every row the first column with ink; SIDE where there is none
    right: (
        np.ndarray
    )  # int [28], for every row the column after the last with ink; 0 where there is none

    @property
    def height(self) -> int:
        """Rows from the first with ink to the last."""
        return self.bottom - self.top + 1

    @property
    def width(self) -> np.ndarray:
        """Int [28], columns between the ends of every row."""
        return np.maximum(self.right - self.left, 0)

    @property
    def middle(self) -> int:
        """The column of the axis."""
        rows = slice(self.top, self.bottom + 1)
        return int(np.median((self.left + self.right)[rows]) / 2)


def of(ink: np.ndarray) -> Outline | None:
    """The outline of the largest piece of ink and of those that are not much smaller; None of an empty picture."""
    pieces, count = ndimage.label(ink >= INK, structure=np.ones((3, 3)))
    if count == 0:
        return None
    sizes = ndimage.sum_labels(ink >= INK, pieces, np.arange(1, count + 1))
    mask = np.isin(pieces, 1 + np.flatnonzero(sizes >= _SPECK * sizes.max()))
    rows = np.flatnonzero(mask.any(1))
    left = np.where(mask.any(1), mask.argmax(1), SIDE)
    right = np.where(mask.any(1), SIDE - mask[:, ::-1].argmax(1), 0)
    return Outline(mask, int(rows[0]), int(rows[-1]), left, right)
