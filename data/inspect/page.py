"""inspect.html: one self-contained file with the problems and a sheet of images."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import PIL.ImageDraw

from grain_jax.core import annotations, html, images
from grain_jax.data.inspect import audit, statistics

SIDE = 300  # pixels of the longer side of an image on the sheet
SHOWN_REGIONS = 10
_COLOURS = html.REGION_COLOURS * 2  # by the number of a region, from 1
_STYLE = """
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.5rem; }
td { overflow-wrap: anywhere; } b.number { color: white; padding: 0 .35rem; }
"""
_AUDIT = "1 is annotated; the text fits 2 best. Numbers are cosines; <code>audit.tsv</code> has all regions."


def render(result: dict[str, Any], sample: Sequence[annotations.Annotation], worst: Sequence = ()) -> str:
    """The page: what `statistics.Statistics.result` returns, images, and `audit.rank`'s worst regions."""
    header = ("what", "count", "first example", "what to do")
    rows = [(x["what"], f"{x['count']:,}", x["example"], x["advice"]) for x in result["problems"]]
    lines = ("".join(f"<td>{html.text(cell)}</td>" for cell in row) for row in (header, *rows))
    table = f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    count = f"{len(sample)} of {result['images']['count']:,} images"
    sheet = lambda figures: f'<div class="sheet">{"".join(figures)}</div>'
    sections = [
        html.Section("problems", "Problems", table if rows else "None."),
        html.Section("images", count, sheet(map(_figure, sample))),
    ]
    if worst:
        heading = f"The model disagrees: {len(worst)} of {result['regions']['count']:,} regions"
        sections.insert(1, html.Section("audit", heading, sheet(_card(*pair) for pair in worst), _AUDIT))
    return html.document(
        title=result["set"]["path"],
        header=f"<style>{_STYLE}</style><h1>{html.text(result['set']['path'])}</h1>",
        sections=sections,
        files=[],
    )


def _figure(item: annotations.Annotation) -> str:
    """An image with its boxes, numbered by score, and its texts."""
    best = sorted(item.regions, key=lambda region: -region.score)[:SHOWN_REGIONS]
    lines = [f"<small>{html.text(item.id or item.image)}</small>"]
    for kind, text in statistics.texts_of(item):
        if kind != "description":
            lines.append(f"<small>{kind}: {html.text(text)}</small>")
    for number, region in enumerate(best, 1):
        lines.append(f"{_badge(number)} {html.text(region.description)} <small>{region.score:.2f}</small>")
        if region.negatives:
            lines.append(f"<small>not: {html.text(', '.join(region.negatives))}</small>")
    return _framed(item, best, lines)


def _card(verdict: audit.Verdict, item: annotations.Annotation) -> str:
    """A region with the box that its description fits best, and the text that fits its box best."""
    shown = [annotations.Region(tuple(box), "", 0) for box in (verdict.box, verdict.seen_box)]
    lines = [
        f"<small>{html.text(verdict.where)}; disagreement {verdict.disagreement:.2f}</small>",
        f"{_badge(1)} {html.text(verdict.description)} <small>{verdict.cosine:.2f}</small>",
        f"<small>the model says: {html.text(verdict.called)} {verdict.called_cosine:.2f}</small>",
        f"{_badge(2)} <small>{verdict.seen_cosine:.2f}; IoU with 1: {verdict.seen_iou:.2f}</small>",
    ]
    return _framed(item, shown, lines)


def _badge(number: int) -> str:
    return f'<b class="number" style="background:{_COLOURS[number - 1]}">{number}</b>'


def _framed(item: annotations.Annotation, regions: Sequence[annotations.Region], lines: Sequence[str]) -> str:
    """The image with the boxes of these regions, and lines of HTML below it."""
    try:
        image = _drawn(item, regions)
        shown = f'<img src="{html.data_uri(image)}" width="{image.width}" height="{image.height}">'
    except images.ImageError as error:
        shown = f"<p>{html.text(str(error))}</p>"
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
