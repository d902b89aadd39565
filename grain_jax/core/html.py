"""The shared parts of the HTML pages, which are self-contained files without scripts: frame and images.

`grain_jax.evaluate.report` and `grain-jax inspect` write their pages with it. Imports neither JAX nor numpy.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import PIL.Image
from etils import epath

from grain_jax.core import printable

# For boxes on photographs, in every theme; a white number is legible on each.
REGION_COLOURS = (
    "#d62728", "#1f77b4", "#2a8a2a", "#8250b8", "#c25700", "#0b7d87", "#c2388f", "#7a4b2a",
)  # fmt: skip
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = epath.Path(__file__).with_name("base.css")
_QUALITY = 82  # of JPEG


class Section(NamedTuple):
    """A part of a page with an entry in the navigation."""

    name: str  # its id
    heading: str
    content: str  # HTML
    about: str = ""  # a sentence below the heading; HTML


def text(value: str, *, keep: str = "") -> str:
    """Text as HTML, with the escapes of `printable.plain` for invisible characters but those of `keep`."""
    return escape(printable.plain(value, keep=keep))


def document(*, title: str, header: str, sections: Iterable[Section], files: Sequence[epath.PathLike]) -> str:
    """A page.

    Args:
      title: plain text.
      header: HTML above the navigation.
      sections: in order.
      files: style sheets of the page's own; they come after the shared one.
    """
    style = "".join(epath.Path(path).read_text() for path in (_STYLE, *files))
    sections = list(sections)
    links = "".join(f'<a href="#{part.name}">{part.heading}</a>' for part in sections)
    body = "".join(
        f'<section id="{part.name}" aria-labelledby="{part.name}-title">'
        f'<h2 id="{part.name}-title" tabindex="-1">{part.heading}</h2>'
        + (f'<p class="soft">{part.about}</p>' if part.about else "")
        + f"{part.content}</section>"
        for part in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{text(title)}</title><style>{style}</style></head><body><header>{header}</header>"
        f'<nav aria-label="Sections">{links}</nav><main>{body}</main></body></html>\n'
    )


def data_uri(image: PIL.Image.Image) -> str:
    """An RGB image as JPEG in a data URI; small images keep their colours at full resolution."""
    buffer = io.BytesIO()
    subsampling = 0 if min(image.size) <= 64 else 2
    image.save(buffer, "JPEG", quality=_QUALITY, subsampling=subsampling, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
