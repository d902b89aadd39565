"""The contact sheet as one PNG: images with numbered boxes, and their texts below."""

import functools
import io
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from grain_jax.core import printable as shown_text
from grain_jax.data.inspect import panels

COLUMNS = 4
_MARGIN = 14
_LINE = 18  # pixels
_INK, _SOFT, _PAPER = "#1c1f24", "#636a75", "#ffffff"
_CAPTION_LINES, _DESCRIPTION_LINES = 3, 2  # more is cut off
_CAPTIONS = 2  # shown of each kind
_INDENT = 30  # pixels, of descriptions behind their numbers


class _Line(NamedTuple):
    """A line below an image."""

    text: str
    colour: str
    indent: int
    mark: panels.Mark | None = None  # whose number stands before it


@functools.cache
def _font(size: int, bold: bool = False) -> PIL.ImageFont.FreeTypeFont:
    """DejaVu Sans Mono, which comes with matplotlib and has more characters than the font of PIL."""
    name = "DejaVuSansMono-Bold" if bold else "DejaVuSansMono"
    return PIL.ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", size)


def draw(shown: Sequence[panels.Panel], title: str) -> bytes:
    """The sheet as the bytes of a PNG file; needs at least one panel."""
    columns = min(COLUMNS, len(shown))
    width = _MARGIN + columns * (panels.SIDE + _MARGIN)
    head = wrap(title, width - 2 * _MARGIN, 6)
    top = _MARGIN + _LINE * len(head) + _MARGIN
    rows = []  # (its top, height of its images, (panel, its lines) of each)
    for i in range(0, len(shown), columns):
        row = [(panel, _lines(panel)) for panel in shown[i : i + columns]]
        tall = max(panel.image.height for panel, _ in row)
        rows.append((top, tall, row))
        top += tall + 6 + _LINE * max(len(lines) for _, lines in row) + 2 * _MARGIN
    canvas = PIL.Image.new("RGB", (width, top), _PAPER)
    pen = PIL.ImageDraw.Draw(canvas)
    for i, line in enumerate(head):
        pen.text((_MARGIN, _MARGIN + i * _LINE), line, fill=_INK, font=_font(12))
    for top, tall, row in rows:
        for column, (panel, lines) in enumerate(row):
            left = _MARGIN + column * (panels.SIDE + _MARGIN)
            canvas.paste(draw_boxes(panel), (left, top))
            for i, line in enumerate(lines):
                y = top + tall + 6 + i * _LINE
                if line.mark is not None:
                    _badge(pen, line.mark, (left, y))
                pen.text((left + line.indent, y), line.text, fill=line.colour, font=_font(12))
    out = io.BytesIO()
    canvas.save(out, "PNG")
    return out.getvalue()


def draw_boxes(panel: panels.Panel) -> PIL.Image.Image:
    """The panel's image with its boxes, each line between two thin white ones, and their numbers."""
    image = panel.image.copy()
    pen = PIL.ImageDraw.Draw(image)
    for mark in reversed(panel.marks):  # the best on top
        x1, y1, x2, y2 = (round(edge) for edge in mark.box_xyxy)
        x2, y2 = max(x1, min(x2, image.width) - 1), max(y1, min(y2, image.height) - 1)
        pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white", width=1)
        pen.rectangle((x1, y1, x2, y2), outline=mark.colour, width=2)
    for mark in panel.marks:
        _badge(pen, mark, mark.badge_xy)
    return image


def wrap(text: str, width: int, limit: int) -> list[str]:
    """Lines of at most `width` pixels, at most `limit` of them; " ..." replaces the rest."""
    text = shown_text.plain(" ".join(text[: 10 * width].split()), width * limit // 2)
    characters = int(width / _font(12).getlength("m"))
    lines = textwrap.wrap(text, characters)
    if len(lines) > limit:
        lines[limit - 1 :] = [lines[limit - 1][: characters - 4] + " ..."]
    return lines


def _lines(panel: panels.Panel) -> list[_Line]:
    """The lines of text below an image."""
    lines: list[_Line] = []

    def say(text: str, colour: str = _SOFT, most: int = 1, indent: int = 0, mark=None) -> None:
        for i, line in enumerate(wrap(text, panels.SIDE - indent, most)):
            lines.append(_Line(line, colour, indent, None if i else mark))

    say(f"{panel.name}, {panel.size[0]} x {panel.size[1]}")
    for kind in ("web", "synthetic"):
        for text in [text for k, text in panel.captions if k == kind][:_CAPTIONS]:
            say(f"{kind}: {text}", most=_CAPTION_LINES)
    for mark in panel.marks:
        said = f"{mark.description} ({mark.score:.2f})"
        say(said, _INK, _DESCRIPTION_LINES, _INDENT, mark)
        if mark.negatives:
            say(f"not: {mark.negatives}", most=_DESCRIPTION_LINES, indent=_INDENT)
    if panel.more:
        say(f"and {panel.more} more regions")
    return lines


def _badge(pen: PIL.ImageDraw.ImageDraw, mark: panels.Mark, at: panels.Point) -> None:
    x, y = round(at[0]), round(at[1])
    pen.rectangle((x, y, x + mark.badge_width - 1, y + panels.BADGE[1] - 1), fill=mark.colour)
    middle = (x + mark.badge_width / 2, y + panels.BADGE[1] / 2)
    pen.text(middle, str(mark.number), fill="white", font=_font(11, bold=True), anchor="mm")
