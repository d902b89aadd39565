"""What a text decoder says of images and of their annotated boxes, and where it points."""

import contextlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw

from grain_jax import config as config_lib
from grain_jax.core import errors, html, images
from grain_jax.evaluate import evaluators, grounding, written
from grain_jax.losses import boxes
from grain_jax.report.regions import NoRegions, spread

SHOWN = 24  # images
_BOXES = 5  # of an image, those with the highest scores
_EDGE = 224  # longer side of an image, pixels
_LARGER = 3.0  # times that a small image is enlarged, at most
_WIDTH = 2  # of a line, pixels
_DASH = 5  # pixels
_TEXT = 300  # characters of a text


class _Shown(NamedTuple):
    """The images of a page: n of them."""

    entry: str
    records: list[Any]  # core.annotations.Annotation
    pictures: list[PIL.Image.Image]
    of: int  # annotated images


def collect(predictor: Any, evals: Mapping[str, Any]) -> dict[str, Any]:
    """Captions, descriptions of annotated boxes, and the boxes of these descriptions, of SHOWN images.

    Args:
      predictor: a model with a text decoder (`inference.Predictor`).
      evals: `config.evals`, whose first entry with annotated boxes has the images.

    Returns: JSON-ready: `entry`; `of`; `pictures`, each `name`, `picture` (a data URI), `caption`, `reference` (an
      annotator's, or ""), and `boxes`: `reference`, `reads`, and `iou` of the box that it points at.

    Raises:
      NoRegions: no entry has annotated boxes.
      errors.UserError: the model cannot be used.
    """
    shown = _read(evals)
    sizes = [picture.size for picture in shown.pictures]
    found = [grounding.described_boxes([x], [size]) for x, size in zip(shown.records, sizes)]
    given = [each.boxes_xyxy[:_BOXES] for each in found]
    texts = [
        [record.regions[place].description for place in each.region[:_BOXES]]
        for record, each in zip(shown.records, found)
    ]
    captions = predictor.caption(shown.pictures)
    read = predictor.describe(shown.pictures, given)
    pointed = predictor.point(shown.pictures, texts)
    cards = []
    for i, (record, picture) in enumerate(zip(shown.records, shown.pictures)):
        there = np.array([each.box_xyxy for each in pointed[i]]).reshape(-1, 4)
        iou = np.asarray(boxes.iou_and_union(there, given[i])[0])
        cards.append(
            {
                "name": record.image[-60:],
                "picture": html.data_uri(_drawn(picture, given[i], there), whole_colour=True),
                "caption": captions[i].text[:_TEXT],
                "reference": next(iter(written.captions_of(record)), "")[:_TEXT],
                "boxes": [
                    {
                        "reference": text[:_TEXT],
                        "reads": said.text[:_TEXT],
                        "iou": round(float(x), 2),
                    }
                    for text, said, x in zip(texts[i], read[i], iou)
                ],
            }
        )
    return {"entry": shown.entry, "of": shown.of, "pictures": cards}


def _read(evals: Mapping[str, Any]) -> _Shown:
    """The images, those left out that cannot be read. Raises as `collect`."""
    for name, entry in evals.items():
        with contextlib.suppress(errors.MissingData, config_lib.ConfigError):
            parsed = config_lib.evaluator_from_dict(entry)
            if not isinstance(parsed, evaluators.AnnotatedImages):
                continue
            found = parsed.available()[0].read()
            usable = [i for i, record in enumerate(found.records) if record.regions]
            records, pictures = [], []
            for place in spread(len(usable), SHOWN).tolist() if usable else ():
                with contextlib.suppress(images.ImageError):
                    pictures.append(images.to_rgb(found.images[usable[place]].load()))
                    records.append(found.records[usable[place]])
            if records:
                return _Shown(name, records, pictures, len(usable))
    raise NoRegions("no entry of config.evals has annotated boxes")


def _drawn(
    picture: PIL.Image.Image, given_xyxy: np.ndarray, pointed_xyxy: np.ndarray
) -> PIL.Image.Image:
    """The picture, small, with the annotated boxes [n, 4] (solid) and those pointed at (dashed), in [0, 1]."""
    share = min(_LARGER, _EDGE / max(picture.size))
    size = [max(1, round(side * share)) for side in picture.size]
    small = picture.resize((size[0], size[1]), PIL.Image.Resampling.LANCZOS)
    draw = PIL.ImageDraw.Draw(small)
    corner = np.array([*size, *size]) - 1
    for i, (given, pointed) in enumerate(zip(given_xyxy, pointed_xyxy)):
        colour = html.REGION_COLOURS[i % len(html.REGION_COLOURS)]
        draw.rectangle((given * corner).round().tolist(), outline=colour, width=_WIDTH)
        _dashed(draw, (pointed * corner).round().astype(int).tolist(), colour)
    return small


def _dashed(draw: PIL.ImageDraw.ImageDraw, box: Sequence[int], colour: str) -> None:
    """The outline of a box of whole pixels."""
    x1, y1, x2, y2 = box
    for x in range(x1, x2 + 1, 2 * _DASH):
        for y in (y1, y2):
            draw.line((x, y, min(x + _DASH, x2), y), fill=colour, width=_WIDTH)
    for y in range(y1, y2 + 1, 2 * _DASH):
        for x in (x1, x2):
            draw.line((x, y, x, min(y + _DASH, y2)), fill=colour, width=_WIDTH)


def rendered(name: str, found: Mapping[str, Any]) -> str:
    """The HTML of the result of `collect`, of the run `name`."""
    cards = ""
    for card in found["pictures"]:
        lines = ""
        for i, box in enumerate(card["boxes"]):
            colour = html.REGION_COLOURS[i % len(html.REGION_COLOURS)]
            lines += (
                f'<li><b style="color:{colour}">\u25a0</b> {escape(box["reads"]) or "(nothing)"}'
                f' <small class="soft">annotated: {escape(box["reference"])}; points at IoU {box["iou"]:.2f}'
                "</small></li>"
            )
        about = escape(card["reference"])
        about = f'<br><small class="soft">annotated: {about}</small>' if about else ""
        says = escape(card["caption"]) or "(nothing)"
        cards += (
            f'<figure style="margin:0"><img style="max-width:100%" src="{card["picture"]}"'
            f' alt="{escape(card["name"])}: annotated boxes and those pointed at"><figcaption><b>{says}</b>{about}'
            f'<ul style="list-style:none;padding:0">{lines}</ul></figcaption></figure>'
        )
    about = escape(f"{name.replace('_', ' ')}: {len(found['pictures'])} of {found['of']} images")
    grid = "display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr))"
    return f'<h3>{about}</h3><div style="{grid}">{cards}</div>'
