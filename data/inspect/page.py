"""inspect.html: one self-contained file with problems, numbers, frequent texts and a sheet of images."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import PIL.Image
import PIL.ImageDraw

from grain_jax.core import annotations, html, images, printable
from grain_jax.data.inspect import problems, statistics

SIDE = 300  # pixels of the longer side of an image on the sheet
SHOWN_REGIONS, SHOWN_NEGATIVES, SHOWN_TEXTS = 10, 3, 12
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 85rem; margin: 2rem auto; padding: 0 1.5rem; }
td, th { text-align: left; vertical-align: top; padding: .15rem 1rem .15rem 0; overflow-wrap: anywhere; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.5rem; }
figure { margin: 0; } p { margin: .2rem 0; } small { opacity: .75; }
b.number { color: white; padding: 0 .35rem; border-radius: .2rem; }
"""


def render(
    result: dict[str, Any],
    problem_list: Sequence[problems.Problem],
    sample: Sequence[annotations.Annotation],
) -> str:
    """The HTML of the page: what `statistics.Statistics.result` returns, the problems, some images."""
    heading = f"{result['set']['path']}: {result['set']['kind']}"
    rows = [
        (p.what, f"{p.count:,}", f"{p.count / p.total:.2%}" if p.total else "", p.example, p.advice)
        for p in problem_list
    ]
    parts = [
        f"<h1>{_text(heading)}</h1><h2>Problems</h2>",
        _table(("what", "count", "share", "first example", "what to do"), rows) or "<p>None.</p>",
        f"<h2>Numbers</h2>{_numbers(result)}<h2>Frequent texts</h2>",
    ]
    for kind, texts in result["texts"].items():
        frequent = [(text, f"{n:,}") for text, n in texts["most_frequent"][:SHOWN_TEXTS] if n > 1]
        parts.append(_table((f"{kind} texts that several images have", "images"), frequent))
    count = f"{len(sample)} of {result['images']['count']:,} images"
    parts.append(f'<h2>Images</h2><p>{count}.</p><div class="sheet">')
    parts += [*map(_figure, sample), "</div>"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_text(heading)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _text(text: str) -> str:
    return escape(printable.plain(text))


def _table(header: Iterable[str], rows: Sequence[Iterable[str]]) -> str:
    """A table of plain texts; "" without rows."""
    lines = ("".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows)
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>" if rows else ""


def _numbers(result: dict[str, Any]) -> str:
    regions, numbers = result["regions"], {}
    for kind, texts in result["texts"].items():
        numbers |= {f"{kind}: {unit}": texts[unit] for unit in ("words", "tokens")}
    numbers |= {
        "regions per image": regions["per_image"],
        "negatives per region": regions["negatives"],
        "area of a box, per mille of the image": regions["area_per_mille"],
        "score of a box, per mille": regions["score_per_mille"],
    }
    names = ("mean", "min", "median", "p95", "p99", "max")
    rows = [
        (name, f"{x['count']:,}", *(f"{x[key]:,.4g}" for key in names))
        for name, x in numbers.items()
        if x["count"]
    ]
    return _table(("", "count", *names), rows)


def _figure(item: annotations.Annotation) -> str:
    """An image with its boxes, numbered by score, and its texts."""
    regions = sorted(item.regions, key=lambda region: -region.score)
    best = regions[:SHOWN_REGIONS]
    lines = [f"<small>{_text(item.id or item.image)}</small>"]
    try:
        image = draw(item, best)
        shown = f'<img src="{html.data_uri(image)}" width="{image.width}" height="{image.height}">'
    except images.ImageError as error:
        shown = f"<p>{_text(str(error))}</p>"
    for kind, text in statistics.texts_of(item):
        if kind != "description":
            lines.append(f"<small>{kind}: {_text(text)}</small>")
    for number, region in enumerate(best, 1):
        badge = f'<b class="number" style="background:{_colour(number)}">{number}</b>'
        lines.append(f"{badge} {_text(region.description)} <small>{region.score:.2f}</small>")
        if region.negatives:
            more = len(region.negatives) - SHOWN_NEGATIVES
            negatives = ", ".join(region.negatives[:SHOWN_NEGATIVES])
            negatives += f", and {more} more" if more > 0 else ""
            lines.append(f"<small>not: {_text(negatives)}</small>")
    if len(regions) > len(best):
        lines.append(f"<small>and {len(regions) - len(best)} more regions</small>")
    return f"<figure>{shown}{''.join(f'<p>{line}</p>' for line in lines)}</figure>"


def _colour(number: int) -> str:
    return html.REGION_COLOURS[(number - 1) % len(html.REGION_COLOURS)]


def draw(item: annotations.Annotation, regions: Sequence[annotations.Region]) -> PIL.Image.Image:
    """The image, SIDE pixels long, with the boxes of these regions, numbered from 1. Raises ImageError."""
    image = images.to_rgb(images.decode_image(item.encoded, item.image))
    scale = SIDE / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    pen = PIL.ImageDraw.Draw(image)
    for number, region in reversed([*enumerate(regions, 1)]):  # the best on top
        x1, y1, x2, y2 = (round(edge * scale) for edge in region.box_xyxy)
        x1, y1 = max(0, min(x1, width - 1)), max(0, min(y1, height - 1))
        x2, y2 = max(x1, min(x2, width - 1)), max(y1, min(y2, height - 1))
        pen.rectangle((x1, y1, x2, y2), outline=_colour(number), width=2)
        pen.rectangle((x1, y1, x1 + 8 + 6 * (number > 9), y1 + 11), fill=_colour(number))
        pen.text((x1 + 2, y1), str(number), fill="white")
    return image
