"""Boxes and words for the parts of a garment, shoe or bag, measured on its picture of 28 x 28 grey values.

The pictures of Fashion-MNIST lie upright on an empty ground, garments from the front, shoes with the toe on the
left. So a part is told by a few measures of the outline and of the grey values in it. Where a measure lies between two
looks, the part is left out. docs/howto/real_pictures.md says how often each rule fires and how often it errs.
"""

from collections.abc import Iterator

import numpy as np
from grain_jax.data.fetch import accessories, garments, outline
from grain_jax.data.fetch.outline import SIDE, Outline, Part
from scipy import ndimage

_TOPS = ("T-shirt", "pullover", "dress", "coat", "shirt")
_CLOSED = ("pullover", "coat", "shirt")  # the folds of the others look like a closure
_SHOES = ("sandal", "sneaker", "ankle boot")
_LEAST = 30  # pixels of ink that can be measured


def parts(ink: np.ndarray, kind: str) -> list[Part]:
    """The parts that can be measured in a picture; of one description there are several only of sleeves and legs.

    Args:
      ink: uint8 [28, 28], darkness: 0 = the white ground, as the files of the package store it.
      kind: name of the class; it says which parts to look for, never how one looks.

    Returns: parts whose boxes lie in the picture and are not empty.
    """
    found = outline.of(ink)
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
        yield from garments.of_top(ink, found, closure=kind in _CLOSED)
    elif kind in _SHOES:
        yield from accessories.of_shoe(found, sandal=kind == "sandal")
    elif kind == "trouser":
        yield from garments.of_trousers(found)
    elif kind == "bag":
        yield from accessories.of_bag(found)
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
