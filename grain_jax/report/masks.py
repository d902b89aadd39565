"""Images of a segmentation with their true and predicted classes, in colours."""

import colorsys
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import PIL.Image

from grain_jax.core import html, images
from grain_jax.evaluate import segmentation, segmentation_sets
from grain_jax.report.regions import spread

SHOWN = 8  # images of each evaluation
_EDGE = 224  # longer side of an image in a strip, pixels
_LARGER = 3.0  # times that a small image is enlarged, at most
_GAP = 4
_IGNORED, _BACKGROUND = (128, 128, 128), (24, 24, 24)
_HUE = 0.618034  # between the colours of classes, of a turn: neighbours differ
_NAME = 60  # characters of a file name


def colours(count: int) -> np.ndarray:
    """A colour for each class, uint8 [count, 3]; none is grey."""
    levels = ((0.95, 0.85), (0.55, 0.95), (0.9, 0.5))  # saturation and value, class after class
    found = [colorsys.hsv_to_rgb(i * _HUE % 1, *levels[i % 3]) for i in range(count)]
    return np.round(np.array(found).reshape(-1, 3) * 255).astype(np.uint8)


def collect(predictor: Any, entry: segmentation.Segmentation) -> dict[str, Any]:
    """Strips of images, spread over the set, and the classes that occur in them.

    Returns: JSON-ready: `pictures`, each `name`, `strip` (a data URI: image, truth, prediction) and `right`, a share of
      the pixels; `classes`, [name, colour] of those that occur; `of`, images of the set.

    Raises:
      errors.UserError: the set or the model cannot be used.
    """
    found = entry.open()
    segmenter = entry.segmenter(predictor, found)
    prepare = segmentation_sets.prepare(
        found.pairs, segmenter.cutter(predictor.model.image.image_size)
    )
    palette, cards, seen = colours(len(found.names)), [], set()
    if found.background is not None:
        palette[found.background] = _BACKGROUND
    files = found.images(entry.turned)
    for position in spread(len(files), SHOWN).tolist():
        try:
            image = files[position].load()
            windows, truth = prepare(position, image)
        except images.ImageError:  # the evaluation names it
            continue
        (predicted,) = segmenter.labels([windows])
        known = truth >= 0
        right = float((truth == predicted)[known].mean()) if known.any() else None
        small, true, said = _small(images.to_rgb(image), truth, predicted)
        seen.update(np.unique(true).tolist(), np.unique(said).tolist())
        name = found.pairs[position].image.name[-_NAME:]
        strip = html.data_uri(_strip(small, true, said, palette), whole_colour=True)
        cards.append({"name": name, "strip": strip, "right": right})
    legend = [
        [found.labels[i], "#" + bytes(palette[i].tolist()).hex()] for i in sorted(seen) if i >= 0
    ]
    return {"pictures": cards, "classes": legend, "of": len(files)}


def _small(image: PIL.Image.Image, *labels: np.ndarray) -> list[Any]:
    """The image with a longer side of _EDGE pixels, and arrays of labels [H, W] of that size, nearest neighbours."""
    share = min(_LARGER, _EDGE / max(image.size))
    width, height = (max(1, round(side * share)) for side in image.size)
    y = (np.arange(height) + 0.5) * image.height / height
    x = (np.arange(width) + 0.5) * image.width / width
    small = [each[y.astype(int)[:, None], x.astype(int)] for each in labels]
    return [np.asarray(image.resize((width, height), PIL.Image.Resampling.LANCZOS)), *small]


def _strip(
    image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, palette: np.ndarray
) -> PIL.Image.Image:
    """Image, truth and prediction side by side; ignored pixels are grey."""
    gap = np.full((len(image), _GAP, 3), 255, np.uint8)
    grey = np.array(_IGNORED, np.uint8)
    painted = [np.where(x[:, :, None] >= 0, palette[x], grey) for x in (truth, predicted)]
    return PIL.Image.fromarray(np.concatenate([image, gap, painted[0], gap, painted[1]], axis=1))


def rendered(name: str, found: Mapping[str, Any]) -> str:
    """The HTML of the result of `collect` for the evaluation `name`."""
    figures = ""
    for card in found["pictures"]:
        right = "" if card["right"] is None else f", {card['right']:.1%} of the pixels right"
        says = escape(f"{card['name']}{right}")
        figures += (
            f'<figure style="margin:0 0 1rem"><img style="max-width:100%" src="{card["strip"]}"'
            f' alt="{says}: image, truth and prediction"><figcaption class="soft">{says}</figcaption></figure>'
        )
    swatch = '<i style="display:inline-block;width:.9em;height:.9em;margin-right:.3em;background:{}"></i>'
    legend = "".join(
        f'<li style="display:inline-block;margin-right:1em">{swatch.format(escape(colour))}{escape(label)}</li>'
        for label, colour in found["classes"]
    )
    about = escape(f"{name.replace('_', ' ')}: {len(found['pictures'])} of {found['of']} images")
    return f'<h3>{about}</h3><ul style="list-style:none;padding:0">{legend}</ul>{figures}'
