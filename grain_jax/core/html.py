"""The shared parts of the HTML pages, which are self-contained files: frame, tables and images.

`grain_jax.evaluate.report` and `grain-jax inspect` write their pages with it. Imports neither JAX nor numpy.
"""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import PIL.Image
from etils import epath

# Of boxes on photographs, whatever the theme; a white number is legible on each.
REGION_COLOURS = (
    "#d62728", "#1f77b4", "#2a8a2a", "#8250b8", "#c25700", "#0b7d87", "#c2388f", "#7a4b2a",
)  # fmt: skip
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_HERE = epath.Path(__file__).parent
_STYLES, _SCRIPTS = ("base.css",), ("elements.js",)


class Section(NamedTuple):
    """A part of a page with an entry in the navigation."""

    name: str  # its id
    heading: str
    content: str  # HTML
    about: str = ""  # a sentence below the heading; HTML


def document(
    *,
    title: str,
    header: str,
    sections: Iterable[Section],
    files: Sequence[epath.PathLike],
    data: Any = None,
    after: str = "",
) -> str:
    """A page.

    Args:
      title: plain text.
      header: HTML above the navigation.
      sections: in order.
      files: style sheets (.css) and scripts (.js) of the page's own; they come after the shared ones.
      data: JSON-ready; the scripts find it in the element `data`.
      after: HTML below the sections.
    """
    paths = [*(_HERE / name for name in (*_STYLES, *_SCRIPTS)), *map(epath.Path, files)]
    style = "".join(path.read_text() for path in paths if path.suffix == ".css")
    script = "".join(path.read_text() for path in paths if path.suffix == ".js")
    sections = list(sections)
    links = "".join(f'<a href="#{part.name}">{part.heading}</a>' for part in sections)
    body = "".join(
        f'<section id="{part.name}" aria-labelledby="{part.name}-title">'
        f'<h2 id="{part.name}-title" tabindex="-1">{part.heading}</h2>'
        + (f'<p class="soft">{part.about}</p>' if part.about else "")
        + f"{part.content}</section>"
        for part in sections
    )
    embedded = ""
    if data is not None:
        embedded = f'<script type="application/json" id="data">{_embedded(data)}</script>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><header>{header}</header>"
        f'<nav aria-label="Sections">{links}</nav><main>{body}</main>{after}'
        '<noscript><p class="none">Charts and images need JavaScript.</p></noscript>'
        f'{embedded}<script>"use strict";\nconst REGION_COLOURS = {json.dumps(REGION_COLOURS)};\n'
        f"{script}</script></body></html>\n"
    )


def _embedded(value: Any) -> str:
    """JSON that cannot close its script element, whatever its texts contain."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    classes: Sequence[str],
    *,
    table_class: str = "",
) -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
      header: HTML of each column's heading.
      rows: HTML of the cells.
      classes: of each column's cells, e.g. "number".
      table_class: of the table.
    """
    head = "".join(f'<th scope="col" class="{c}">{h}</th>' for h, c in zip(header, classes))
    body = "".join(
        "<tr>" + "".join(f'<td class="{c}">{cell}</td>' for cell, c in zip(row, classes)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{table_class}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def data_uri(image: PIL.Image.Image, *, quality: int = 82, whole_colour: bool = False) -> str:
    """An image as JPEG in a data URI.

    Args:
      image: RGB.
      quality: of JPEG.
      whole_colour: keeps colours at full resolution; those of small images are kept so anyway.
    """
    buffer = io.BytesIO()
    subsampling = 0 if whole_colour or min(image.size) <= 64 else 2
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
