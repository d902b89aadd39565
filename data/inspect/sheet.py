"""The contact sheet as one PNG: images with numbered boxes, and their texts below."""

import functools
import io
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
    """DejaVu Sans, which comes with matplotlib and has more characters than the font of PIL."""
    name = "DejaVuSans-Bold" if bold else "DejaVuSans"
    return PIL.ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", size)


def draw(shown: Sequence[panels.Panel], title: str) -> bytes:
    """The sheet as the bytes of a PNG file; needs at least one panel."""
    columns = min(COLUMNS, len(shown))
    width = _MARGIN + columns * (panels.SIDE + _MARGIN)
    head = wrap(title, width - 2 * _MARGIN, 6)
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    top = _MARGIN + _LINE * len(head) + _MARGIN
    tall = [max(p.image.height for p in row) for row in rows]
    texts = [[_lines(panel) for panel in row] for row in rows]
    heights = [
        image_height + 6 + _LINE * max(map(len, lines)) + 2 * _MARGIN
        for image_height, lines in zip(tall, texts)
    ]
    canvas = PIL.Image.new("RGB", (width, top + sum(heights)), _PAPER)
    pen = PIL.ImageDraw.Draw(canvas)
    for i, line in enumerate(head):
        pen.text((_MARGIN, _MARGIN + i * _LINE), line, fill=_INK, font=_font(13))
    for row, image_height, lines, height in zip(rows, tall, texts, heights):
        for column, (panel, below) in enumerate(zip(row, lines)):
            left = _MARGIN + column * (panels.SIDE + _MARGIN)
            canvas.paste(draw_boxes(panel), (left, top))
            for i, line in enumerate(below):
                y = top + image_height + 6 + i * _LINE
                if line.mark is not None:
                    _badge(pen, line.mark, (left, y))
                pen.text((left + line.indent, y), line.text, fill=line.colour, font=_font(12))
        top += height
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
    measure, lines, line = _font(12).getlength, [], ""
    for word in text.split():
        while word:
            candidate = f"{line} {word}".strip()
            if measure(candidate) <= width:
                line, word = candidate, ""
            elif line:
                lines.append(line)
                line = ""
            else:  # a word wider than the line
                fits = next(
                    n for n in range(len(word), 0, -1) if n == 1 or measure(word[:n]) <= width
                )
                lines.append(word[:fits])
                word = word[fits:]
    lines += [line] if line else []
    if len(lines) > limit:
        lines = lines[:limit]
        while lines[-1] and measure(lines[-1] + " ...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += " ..."
    return lines


def _lines(panel: panels.Panel) -> list[_Line]:
    """The lines of text below an image."""
    width, height = panel.size
    head = wrap(f"{panel.name}, {width} x {height}", panels.SIDE, 1)
    lines = [_Line(text, _SOFT, 0) for text in head]
    for kind in ("web", "synthetic"):
        for text in [text for k, text in panel.captions if k == kind][:_CAPTIONS]:
            wrapped = wrap(f"{kind}: {text}", panels.SIDE, _CAPTION_LINES)
            lines += [_Line(text, _SOFT, 0) for text in wrapped]
    for mark in panel.marks:
        wrapped = wrap(
            f"{mark.description} ({mark.score:.2f})", panels.SIDE - _INDENT, _DESCRIPTION_LINES
        )
        lines += [_Line(text, _INK, _INDENT, None if i else mark) for i, text in enumerate(wrapped)]
        if mark.negatives:
            wrapped = wrap(f"not: {mark.negatives}", panels.SIDE - _INDENT, _DESCRIPTION_LINES)
            lines += [_Line(text, _SOFT, _INDENT) for text in wrapped]
    if panel.more:
        lines.append(_Line(f"and {panel.more} more regions", _SOFT, 0))
    return lines


def _badge(pen: PIL.ImageDraw.ImageDraw, mark: panels.Mark, at: panels.Point) -> None:
    x, y = round(at[0]), round(at[1])
    pen.rectangle((x, y, x + mark.badge_width - 1, y + panels.BADGE[1] - 1), fill=mark.colour)
    middle = (x + mark.badge_width / 2, y + panels.BADGE[1] / 2)
    pen.text(middle, str(mark.number), fill="white", font=_font(11, bold=True), anchor="mm")
