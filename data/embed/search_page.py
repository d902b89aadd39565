"""The page of `grain-jax search`: for each question the images that were found, with their regions."""

from collections.abc import Callable, Sequence
from html import escape as html_escape
from typing import NamedTuple

import numpy as np
import PIL.Image
from etils import epath

from grain_jax.core import html, printable
from grain_jax.core import images as images_lib
from grain_jax.data.embed import search

_EDGE = 480  # pixels of the longer side of an image
_OTHERS = html.REGION_COLOURS[1]
_MOST = 400  # characters of a name that are shown


def escape(text: str) -> str:
    """HTML that shows a text of anybody's: markup and control characters as characters, cut to _MOST."""
    return html_escape(printable.plain(text, _MOST))


class Question(NamedTuple):
    """What was asked."""

    text: str  # as it was typed, or the name of the image
    image: PIL.Image.Image | None = None
    box_xyxy: np.ndarray | None = None  # in [0, 1]: the region of `image` that was asked for


def render(
    folder: str,
    questions: Sequence[Question],
    found: Sequence[Sequence[search.Hit]],
    load: Callable[[search.Hit], PIL.Image.Image | str],
    about: str,
) -> str:
    """The HTML of the page.

    Args:
      folder: of the embeddings.
      questions: in order.
      found: the hits of each.
      load: gives the image of a hit, or why there is none.
      about: a sentence for the head.
    """
    sections = [
        html.Section(
            f"question-{number}",
            escape(question.text),
            _asked(question)
            + '<div class="cards">'
            + "".join(_card(rank, hit, load(hit)) for rank, hit in enumerate(hits, 1))
            + "</div>",
        )
        for number, (question, hits) in enumerate(zip(questions, found), 1)
    ]
    return html.document(
        title=f"{folder}: grain-jax search",
        header=f'<div><h1>Found images</h1><p class="soft"><code>{escape(folder)}</code>: {escape(about)}</p></div>',
        sections=sections,
        files=[epath.Path(__file__).parent / "search_page.css"],
    )


def _asked(question: Question) -> str:
    if question.image is None:
        return ""
    boxes = [] if question.box_xyxy is None else [question.box_xyxy]
    return f'<figure class="card asked">{_image(question.image, boxes, 0, "the question")}</figure>'


def _card(rank: int, hit: search.Hit, image: PIL.Image.Image | str) -> str:
    if isinstance(image, str):
        shown = f'<p class="none">{escape(image)}</p>'
    else:
        shown = _image(image, hit.boxes_xyxy, hit.region, hit.path)
    named = escape(hit.path) if hit.id == hit.path else f"{escape(hit.id)}<br>{escape(hit.path)}"
    return (
        f'<figure class="card">{shown}<figcaption><b>{rank}</b>{hit.score:.3f} · '
        f"{hit.width} x {hit.height}<br>{named}</figcaption></figure>"
    )


def _image(
    image: PIL.Image.Image,
    boxes_xyxy: Sequence[np.ndarray] | np.ndarray,
    best: int | None,
    what: str,
) -> str:
    """An image with its boxes over it, in shares of its sides; the one at `best` is drawn last, and stronger."""
    small = images_lib.to_rgb(image)
    small.thumbnail((_EDGE, _EDGE), PIL.Image.Resampling.LANCZOS)
    order = sorted(range(len(boxes_xyxy)), key=lambda i: i == best)
    boxes = "".join(_box(boxes_xyxy[i], strong=i == best) for i in order)
    return (
        f'<div class="image"><img src="{html.data_uri(small)}" width="{small.width}" height="{small.height}"'
        f' alt="{escape(what)}"><svg class="boxes" viewBox="0 0 1 1" preserveAspectRatio="none"'
        f' aria-hidden="true">{boxes}</svg></div>'
    )


def _box(box_xyxy: np.ndarray, *, strong: bool) -> str:
    x1, y1, x2, y2 = (round(float(x), 4) for x in box_xyxy)
    place = f'x="{x1}" y="{y1}" width="{x2 - x1:.4f}" height="{y2 - y1:.4f}"'
    colour = html.REGION_COLOURS[0] if strong else _OTHERS
    halo = f'<rect class="halo" {place}/>' if strong else ""
    line = f'<rect class="line" {place} stroke="{colour}"/>'
    return f'<g class="{"best" if strong else "other"}">{halo}{line}</g>'
