"""An image of the contact sheet, ready to be drawn: scaled, its boxes numbered, the numbers placed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image

from grain_jax.core import images
from grain_jax.core.html import REGION_COLOURS
from grain_jax.data.inspect import reading
from grain_jax.data.inspect.statistics import texts_of

SIDE = 300  # pixels of a panel's longer side
SHOWN = 10  # regions an image
SHOWN_NEGATIVES = 3  # of a region
BADGE = (17, 16)  # pixels of a one-digit number's badge; a digit more takes 7 more

Point = tuple[float, float]


class Mark(NamedTuple):
    """A region as it is drawn."""

    number: int  # from 1, by score
    colour: str
    box_xyxy: tuple[float, float, float, float]  # pixels of the panel
    badge_xy: Point  # top left corner of the badge with the number
    badge_width: int
    description: str
    score: float
    negatives: str  # the first few and the number of the others; "" where there are none


class Panel(NamedTuple):
    """An image with its texts and regions."""

    name: str
    image: PIL.Image.Image  # RGB
    size: tuple[int, int]  # of the image itself
    captions: tuple[tuple[str, str], ...]  # (web or synthetic, text)
    marks: tuple[Mark, ...]  # highest score first
    more: int  # regions that are not shown


def make(item: reading.Item) -> Panel | None:
    """The panel of an item; None if its image is damaged."""
    try:
        image = images.decode_image(item.encoded, item.name, item.orientation).convert("RGB")
    except images.ImageError:
        return None
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(edge * scale)) for edge in image.size)
    image = image.resize(size, PIL.Image.Resampling.LANCZOS)
    best = np.argsort(-item.scores, kind="stable")[:SHOWN].tolist()
    boxes = np.clip(np.nan_to_num(item.boxes_xyxy[best]), 0, 1) * [*size, *size]
    widths = [BADGE[0] + 7 * (number > 9) for number in range(1, len(best) + 1)]
    badges = place_badges(boxes.tolist(), widths, size)
    marks = tuple(
        Mark(
            number=place + 1,
            colour=REGION_COLOURS[place % len(REGION_COLOURS)],
            box_xyxy=tuple(boxes[place].tolist()),
            badge_xy=badges[place],
            badge_width=widths[place],
            description=item.descriptions[i],
            score=float(item.scores[i]),
            negatives=_joined(item.negatives[i]),
        )
        for place, i in enumerate(best)
    )
    captions = tuple(text for text in texts_of(item) if text[0] != "description")
    more = len(item.descriptions) - len(best)
    return Panel(item.name, image, item.size, captions, marks, more)


def _joined(negatives: Sequence[str]) -> str:
    more = len(negatives) - SHOWN_NEGATIVES
    text = ", ".join(negatives[:SHOWN_NEGATIVES])
    return f"{text}, and {more} more" if more > 0 else text


def place_badges(
    boxes_xyxy: Sequence[Sequence[float]], widths: Sequence[int], size: tuple[int, int]
) -> list[Point]:
    """A place for the number of each box: at a corner of the box, else near it, never on another number.

    Args:
      boxes_xyxy: pixels of the panel.
      widths: of the badges, pixels.
      size: width and height of the panel.
    """
    placed: list[tuple[float, float, int]] = []  # x, y, width
    height = BADGE[1]
    for (x1, y1, x2, y2), width in zip(boxes_xyxy, widths):
        across, down = (x1, x2 - width), (y1, y2 - height, y1 - height, y2)
        wanted = [(x, y) for y in down for x in across]
        # Then any place, the nearest to the corner of the box first.
        anywhere = [(x, y) for y in range(0, size[1], height) for x in range(0, size[0], width)]
        anywhere.sort(key=lambda at: (at[0] - x1) ** 2 + (at[1] - y1) ** 2)
        inside = [_within(at, width, size) for at in (*wanted, *anywhere)]
        free = (at for at in inside if not any(_overlap(at, width, other) for other in placed))
        chosen = next(free, inside[0])  # an image may be too narrow for all its numbers
        placed.append((*chosen, width))
    return [(x, y) for x, y, _ in placed]


def _within(at: Point, width: int, size: tuple[int, int]) -> Point:
    return max(0.0, min(at[0], size[0] - width)), max(0.0, min(at[1], size[1] - BADGE[1]))


def _overlap(at: Point, width: int, other: tuple[float, float, int]) -> bool:
    (x, y), (other_x, other_y, other_width) = at, other
    return x < other_x + other_width and other_x < x + width and abs(y - other_y) < BADGE[1]
