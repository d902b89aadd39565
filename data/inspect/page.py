"""inspect.html: one self-contained file with the problems and a sheet of images."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import PIL.ImageDraw

from grain_jax.core import annotations, html, images
from grain_jax.data.inspect import statistics

SIDE = 300  # pixels of the longer side of an image on the sheet
SHOWN_REGIONS = 10
_COLOURS = html.REGION_COLOURS * 2  # by the number of a region, from 1
_STYLE = """
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.5rem; }
td { overflow-wrap: anywhere; } b.number { color: white; padding: 0 .35rem; }
"""


def render(result: dict[str, Any], sample: Sequence[annotations.Annotation]) -> str:
    """The HTML of the page: what `statistics.Statistics.result` returns, and some images."""
    header = ("what", "count", "first example", "what to do")
    rows = [(x["what"], f"{x['count']:,}", x["example"], x["advice"]) for x in result["problems"]]
    lines = ("".join(f"<td>{html.text(cell)}</td>" for cell in row) for row in (header, *rows))
    table = f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    count = f"{len(sample)} of {result['images']['count']:,} images"
    figures = f'<div class="sheet">{"".join(map(_figure, sample))}</div>'
    return html.document(
        title=result["set"]["path"],
        header=f"<style>{_STYLE}</style><h1>{html.text(result['set']['path'])}</h1>",
        sections=[
            html.Section("problems", "Problems", table if rows else "None."),
            html.Section("images", count, figures),
        ],
        files=[],
    )


def _figure(item: annotations.Annotation) -> str:
    """An image with its boxes, numbered by score, and its texts."""
    best = sorted(item.regions, key=lambda region: -region.score)[:SHOWN_REGIONS]
    lines = [f"<small>{html.text(item.id or item.image)}</small>"]
    try:
        image = _drawn(item, best)
        shown = f'<img src="{html.data_uri(image)}" width="{image.width}" height="{image.height}">'
    except images.ImageError as error:
        shown = f"<p>{html.text(str(error))}</p>"
    for kind, text in statistics.texts_of(item):
        if kind != "description":
            lines.append(f"<small>{kind}: {html.text(text)}</small>")
    for number, region in enumerate(best, 1):
        badge = f'<b class="number" style="background:{_COLOURS[number - 1]}">{number}</b>'
        lines.append(f"{badge} {html.text(region.description)} <small>{region.score:.2f}</small>")
        if region.negatives:
            lines.append(f"<small>not: {html.text(', '.join(region.negatives))}</small>")
    return f"<figure>{shown}{''.join(f'<p>{line}</p>' for line in lines)}</figure>"


def _drawn(item: annotations.Annotation, regions: Sequence[annotations.Region]) -> PIL.Image.Image:
    """The image with the boxes of these regions, numbered from 1. Raises ImageError."""
    image = images.to_rgb(images.decode_image(item.encoded, item.image))
    scale = SIDE / max(image.size)
    image = image.resize([max(1, round(edge * scale)) for edge in image.size])
    pen = PIL.ImageDraw.Draw(image)
    for number, region in reversed([*enumerate(regions, 1)]):  # the best on top
        x1, y1, x2, y2 = (edge * scale for edge in region.box_xyxy)
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=_COLOURS[number - 1], width=2)
        pen.text((x1 + 2, y1), str(number), fill="white", stroke_width=2, stroke_fill="black")
    return image
