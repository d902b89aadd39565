"""The results of `analysis` as HTML: bars of scores, tables of the terms of a score, boxes and heat maps on the image.

The one script is `DRAW`, for the box that the user drags on `canvas`. CSS shows one box of a figure alone while it is
hovered or its radio button is chosen, so that the keyboard works too. Colours come from Gradio's theme, light and dark;
a region has a number beside its colour.
"""

import html
from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
from etils import epath

from grain_jax.core import html as html_lib
from grain_jax.demo import analysis
from grain_jax.inference import scores as scores_lib
from grain_jax.inference import text_decoder
from grain_jax.report import masks

_EDGE = 900  # pixels of the longer edge that an image is sent with, at most
_WIDEST, _HIGHEST, _NARROWEST = 640, 480, 320  # CSS pixels of a figure
_ROWS = 20  # classes that are listed before the fold
_BEST = 10  # classes and descriptions of a box that are listed
_MAP_EDGE = 480  # pixels of the longer edge of a similarity map
# Of the highest cosine of a map: orange, which the colour-blind tell from grey too. The lowest has opacity 0.
_HOT, _OPAQUE = np.array([255, 140, 0]), 0.8
_MASK = 0.55  # opacity of the classes of a segmentation
_TOLD = 5  # of them that its alternative text names

DRAW, CSS = ((epath.Path(__file__).parent / name).read_text() for name in ("draw.js", "page.css"))


def message(text: str) -> str:
    """An error line, which screen readers announce; "" if there is no text."""
    return f'<div class="gj line" role="alert">{html.escape(text)}</div>' if text else ""


def hint(text: str) -> str:
    """A grey line for a part of the page that has no content yet."""
    return f'<p class="gj quiet">{html.escape(text)}</p>'


def scores(result: analysis.Result, *, softmax: bool, chosen: str = "") -> str:
    """The classes with bars, best first: combined, whole image and regions, and the softmax if asked for.

    Args:
      result: what `Analyst.analyse` returned.
      softmax: whether to add a column with the softmax of the combined scores.
      chosen: the class whose name is set in bold; the best one if it is none of the classes.
    """
    columns = [(f"score (alpha {result.alpha:g})", result.combined)]
    if result.regions is not None:
        columns += [("whole image", result.whole), ("regions", result.regions)]
    values = np.concatenate([column for _, column in columns])
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    bold = analysis.explained(result, chosen)[0]
    head = "<th>class</th>" + "".join(f"<th>{html.escape(name)}</th>" for name, _ in columns)
    after = [""] * len(result.combined)  # the last cell of each class
    scale = ""
    if softmax:
        head += '<th class="n">softmax</th>'
        after = [f'<td class="n">{share:.1%}</td>' for share in result.probabilities()]
        scale = f"<p class=quiet>Softmax of {result.logit_scale:.4g} (logit scale) x score.</p>"
    rows = []
    for c in result.ranked():
        cells = f"<td>{html.escape(result.names[c])}</td>"
        for kind, (_, column) in zip((' class="main"', "", ""), columns):
            cells += f"<td{kind}>{_number(column[c])}{_bar(float(column[c]), low, high)}</td>"
        rows.append(f"<tr{' class=chosen' if c == bold else ''}>{cells}{after[c]}</tr>")
    note = f"<p class=quiet>{html.escape(result.note)}</p>" if result.note else ""
    return f'<div class="gj scores">{note}{_folded(head, rows, _ROWS)}{scale}</div>'


def why(result: analysis.Result, chosen: str = "") -> str:
    """The terms of the score of the chosen class (by default the best), beside those of the best other class."""
    pair = analysis.explained(result, chosen)
    cards = "".join(_card(result, c) for c in pair)
    return (
        f'<div class="gj"><p>{_comparison(result, pair)}</p><div class="pair">{cards}</div></div>'
    )


def _comparison(result: analysis.Result, pair: Sequence[int]) -> str:
    if len(pair) < 2:
        return "There is no other class."
    names = [f"<b>{html.escape(result.names[c])}</b>" for c in pair]
    of_class = [analysis.parts(result, c) for c in pair]
    whole = of_class[0][0].units - of_class[1][0].units
    total = sum(p.units for p in of_class[0]) - sum(p.units for p in of_class[1])
    text = f"{names[0]} minus {names[1]}: <b>{_units(total, sign=True)}</b>"
    if result.regions is not None:
        text += (
            f" = {_units(whole, sign=True)} from the whole image"
            f" and {_units(total - whole, sign=True)} from the regions"
        )
    return text + "."


def _card(result: analysis.Result, c: int) -> str:
    parts = analysis.parts(result, c)
    rows = []
    for part in parts:
        label = "whole image, mean over prompts"
        if part.region is not None:
            label = f"{_tag(part.region)} {html.escape(part.text)}"
        rows.append(
            f"<tr><td>{label}</td><td class=n>{_number(part.value)}</td>"
            f"<td class=n>x {part.weight:.3g}</td><td class=n>{_units(part.units, sign=True)}</td></tr>"
        )
    rows.append(
        "<tr class=sum><td>score</td><td></td><td></td>"
        f"<td class=n>{_units(sum(p.units for p in parts))}</td></tr>"
    )
    head = "<th>part</th><th class=n>cosine</th><th class=n>weight</th><th class=n>adds</th>"
    body = _table(head, rows)
    if result.regions is not None:
        a, q = result.alpha, len(result.boxes_xyxy)
        body = (
            f"<p class=quiet>alpha x whole + (1 - alpha) x mean over {q} regions of the best description:"
            f" {a:g} x {result.whole[c]:.4f} + {1 - a:.3g} x {result.regions[c]:.4f}</p>{body}"
        )
        head = (
            "<th>description</th><th>best region</th><th class=n>cosine</th>"
            "<th class=n>box (x1 y1 x2 y2, %)</th>"
        )
        rows = [
            f"<tr><td>{html.escape(f.text)}</td><td>{_tag(f.region)}</td>"
            f"<td class=n>{_number(f.cosine)}</td><td class=n>{_percents(f.box_xyxy)}</td></tr>"
            for f in analysis.found(result, c)
        ]
        body += f"<h4>Each description's best region</h4>{_table(head, rows)}"
    return f"<section><h3>{html.escape(result.names[c])}</h3>{body}</section>"


def regions(
    image: PIL.Image.Image,
    result: analysis.Result,
    *,
    most: int = 100,
    threshold: float = -1.0,
    name: str = "regions",
) -> str:
    """The image with its regions, each with the description that fits it best.

    Args:
      image: RGB.
      result: what `Analyst.analyse` returned for it.
      most: largest number of regions to show; the best fits are kept.
      threshold: cosine below which a region is left out.
      name: name of the group of radio buttons, unique in a page.
    """
    if not len(result.boxes_xyxy):
        return hint("The model has no regions.")
    all_seen = analysis.seen(result)
    if result.regions is None:
        boxes = [(s.region, s.box_xyxy, "", None) for s in all_seen[:most]]
        below = "With descriptions of the classes, each region shows the one that it fits best."
    else:
        fits = [s for s in all_seen if s.cosine >= threshold][:most]
        boxes = [(s.region, s.box_xyxy, _named(s), s.cosine) for s in fits]
        below = f"{len(boxes)} of {len(all_seen)} regions." if len(boxes) < len(all_seen) else ""
    return _figure(image, boxes, name, below)


def canvas(image: PIL.Image.Image) -> str:
    """The image, on which `DRAW` lets the user drag a box."""
    return (
        f'<div class="gj canvas" style="--most:{_pixels(image):.0f}px">'
        '<img alt="the image; drag a box on it, or type the corners of one below" draggable="false"'
        f' src="{_data_uri(image)}"><span class="drawn" hidden></span></div>'
    )


def said(text: str, log_probability: float, is_whole: bool = True) -> str:
    """What the text decoder writes, with dots where it is cut, and how likely it is (nats); HTML."""
    value = f"log-probability {_number(log_probability)}"
    return f'“{html.escape(text)}{"" if is_whole else " …"}” <span class="quiet">{value}</span>'


def caption(written: text_decoder.Written) -> str:
    """The caption of the image."""
    return f'<p class="gj said">{said(*written)}</p>'


def inside(boxed: analysis.Boxed) -> str:
    """The classes of a box with bars, best first, then the best descriptions; and what embeds the box, in words.

    Before them what the text decoder says.
    """
    box = f"{_percents(boxed.box_xyxy)} (x1 y1 x2 y2, %)"
    first = ""
    if boxed.said is not None:
        first = f"<p class=said>The text decoder says: {said(*boxed.said)}</p>"
    if not boxed.classes:
        ranks_none = f"Box {box}. The model has neither a box head nor regions: no class is ranked."
        return f'<div class="gj boxed">{first}<p>{ranks_none}</p></div>'
    if boxed.region is None:
        embedded = f"Box {box}, embedded by the box head."
    elif boxed.iou == 0:
        embedded = (
            f"The model has no box head, and no region overlaps {box}: the IoU is 0."
            f" Region {_tag(boxed.region)}, the nearest, answers."
        )
    else:
        embedded = (
            f"The model has no box head. Region {_tag(boxed.region)} answers: its box overlaps {box} most,"
            f" with an IoU of {boxed.iou:.2f}."
        )
    best = boxed.descriptions[:_BEST]
    values = [ranked.cosine for ranked in (*boxed.classes, *best)]
    low, high = min(0.0, *values), max(0.0, *values)

    def rows(kind: str, ranked: Iterable[analysis.Ranked]) -> list[str]:
        shown = ((r, f"{_number(r.cosine)}{_bar(r.cosine, low, high)}") for r in ranked)
        return [f"<tr><td>{_named(r)}</td><td{kind}>{cell}</td></tr>" for r, cell in shown]

    tables = [_folded("<th>class</th><th>cosine</th>", rows(" class=main", boxed.classes), _BEST)]
    if best:
        tables.append(_table("<th>description (class)</th><th>cosine</th>", rows("", best)))
    sections = "".join(f"<section>{table}</section>" for table in tables)
    return f'<div class="gj boxed">{first}<p>{embedded}</p><div class="pair">{sections}</div></div>'


def _named(ranked: analysis.Ranked) -> str:
    """A class by its name, a description with the name of its class; HTML."""
    text, name = html.escape(ranked.text), html.escape(ranked.name)
    return text if text == name else f"{text} <span class=quiet>({name})</span>"


def places(
    image: PIL.Image.Image, found: Sequence[analysis.Lying], *, name: str = "phrases"
) -> str:
    """The image with the box of each text, and the similarity map of each; arguments as for `regions`.

    With a text decoder also the image with the boxes at which that points, beside the first.
    """
    boxes = [
        (i, lying.region.box_xyxy, html.escape(lying.text), lying.region.score)
        for i, lying in enumerate(found)
        if lying.region is not None
    ]
    pointed = [
        (i, lying.pointed.box_xyxy, html.escape(lying.text), lying.pointed.log_probability)
        for i, lying in enumerate(found)
        if lying.pointed is not None
    ]
    parts = [_figure(image, boxes, name, "")] if boxes else []
    if pointed:
        parts = [f"<h4>Regions, by their cosine</h4>{part}" for part in parts]
        figure = _figure(image, pointed, f"{name}_pointed", "")
        parts.append(f"<h4>Text decoder, log-probability of its box</h4>{figure}")
    below = grey(image)
    for i, lying in enumerate(found):
        if lying.cosines is not None:
            shown = _map(blend(below, lying.cosines), i, lying.text, lying.cosines)
            parts.append(f'<div class="map" style="--most:{_pixels(image):.0f}px">{shown}</div>')
    sections = "".join(f"<section>{part}</section>" for part in parts)
    return f'<div class="gj places">{sections}</div>'


def _map(blended: PIL.Image.Image, number: int, text: str, cosines: np.ndarray) -> str:
    """What `blend` returned for the cosines [h, w] of a text, with the text and the scale."""
    low, high = float(cosines.min()), float(cosines.max())
    y, x = np.unravel_index(cosines.argmax(), cosines.shape)
    across, down = ((i + 0.5) / n for i, n in ((x, cosines.shape[1]), (y, cosines.shape[0])))
    about = f"similarity map of {text}: highest at {across:.0%} from the left and {down:.0%} from the top"
    uri = html_lib.data_uri(blended, quality=90, whole_colour=True)
    return (
        f'<img alt="{html.escape(about)}" src="{uri}"><p>{_tag(number)} {html.escape(text)}</p>'
        f"<p class=scale><span class=n>{_number(low)}</span><i></i><span class=n>{_number(high)}</span></p>"
    )


def segmented(image: PIL.Image.Image, labels: np.ndarray, names: Sequence[str]) -> str:
    """The image in the colours of its classes, and the share of the pixels of each class that has some.

    Args:
      image: RGB.
      labels: int [h, w], positions in `names`, of the whole image at any size.
      names: of the classes.
    """
    counts = np.bincount(labels.ravel(), minlength=len(names))
    ranked: list[int] = [c for c in np.argsort(-counts, kind="stable").tolist() if counts[c]]
    palette, below = masks.colours(len(names)), grey(image)
    places = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(below.shape, labels.shape))
    painted = palette[labels[np.ix_(*places)]]
    blended = (1 - _MASK) * below[:, :, None] + _MASK * painted
    shares = (counts / labels.size).tolist()
    told = ", ".join(f"{shares[c]:.1%} {names[c]}" for c in ranked[:_TOLD])
    alt = html.escape(f"the class of each pixel: {told}{', ...' if len(ranked) > _TOLD else ''}")
    picture = PIL.Image.fromarray(blended.round().astype(np.uint8))
    rows = [
        f'<tr><td><span class="swatch" style="--c:#{palette[c].tobytes().hex()}"></span>{html.escape(names[c])}</td>'
        f'<td class="main">{shares[c]:.1%}{_bar(shares[c], 0.0, 1.0)}</td></tr>'
        for c in ranked
    ]
    table = _folded("<th>class</th><th>share of the pixels</th>", rows, _ROWS)
    uri = html_lib.data_uri(picture, quality=90, whole_colour=True)
    return (
        f'<div class="gj segmented"><div class="pair"><section class="map" style="--most:{_pixels(image):.0f}px">'
        f'<img alt="{alt}" src="{uri}"></section><section>{table}'
        f"<p class=quiet>Classes with pixels: {len(ranked)} of {len(names)}.</p></section></div></div>"
    )


def grey(image: PIL.Image.Image) -> np.ndarray:
    """The image in dark grey, float32 [h, w] in 0 ... 255, for `blend`."""
    scale = _MAP_EDGE / max(image.size)
    width, height = (max(1, round(scale * edge)) for edge in image.size)
    return 30 + 0.55 * np.asarray(image.convert("L").resize((width, height)), np.float32)


def blend(below: np.ndarray, cosines: np.ndarray) -> PIL.Image.Image:
    """What `grey` returned, under one colour whose opacity grows from the lowest cosine [h, w] to the highest."""
    low, high = cosines.min(), cosines.max()
    share = (cosines - low) / ((high - low) or 1.0)
    opacity = _OPAQUE * scores_lib.resize_map(share[None], *below.shape[::-1])[0, :, :, None]
    blended = (1 - opacity) * below[:, :, None] + opacity * _HOT
    return PIL.Image.fromarray(blended.round().astype(np.uint8))


def _pixels(image: PIL.Image.Image) -> float:
    """The width of the image on the page, in CSS pixels."""
    return min(_WIDEST, _HIGHEST * image.width / image.height)


def _figure(
    image: PIL.Image.Image,
    boxes: Sequence[tuple[int, np.ndarray, str, float | None]],
    name: str,
    below: str,
) -> str:
    """The image, and for each box (colour's number, box_xyxy, HTML, score) an outline and a line."""
    tall = image.height / image.width
    pixels = _pixels(image)
    width = max(_NARROWEST, pixels)  # of the figure: the lines need room below a slim image
    scale = 100 * pixels / width
    labels = []
    for number, box_xyxy, text, score in boxes:
        x1, y1, x2, y2 = (float(x) * scale for x in box_xyxy)
        x1, x2 = x1 + (100 - scale) / 2, x2 + (100 - scale) / 2
        # In widths of the figure (cqw), so that its lines below the image do not count.
        place = (
            f"left:{x1:.2f}cqw;top:{y1 * tall:.2f}cqw;width:{x2 - x1:.2f}cqw;"
            f"height:{(y2 - y1) * tall:.2f}cqw"
        )
        shown = "" if score is None else f"<span class=n>{_number(score)}</span>"
        labels.append(
            f'<label class="region" style="--c:{_colour(number)}">'
            f'<input type="radio" name="{name}" value="{number}">'
            f'<span class="box" style="{place}">{_tag(number)}</span>{_tag(number)}'
            f'<span class="text">{text or f"region {number + 1}"}</span>{shown}</label>'
        )
    every = f'<label><input type="radio" name="{name}" value="all" checked> all</label>'
    return (
        f'<div class="gj figure" style="--most:{width:.0f}px">'
        f'<img alt="the image" style="width:{scale:.2f}%" src="{_data_uri(image)}">'
        f"{every if len(labels) > 1 else ''}{''.join(labels)}{hint(below) if below else ''}</div>"
    )


def _data_uri(image: PIL.Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_EDGE, _EDGE), PIL.Image.Resampling.LANCZOS)
    return html_lib.data_uri(small, quality=90, whole_colour=True)


def _table(head: str, rows: Iterable[str]) -> str:
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _folded(head: str, rows: Sequence[str], most: int) -> str:
    """A table of classes, of which those after the first `most` are shown on demand."""
    if len(rows) <= most:
        return _table(head, rows)
    rest = f"<summary>{len(rows) - most} more classes</summary>{_table(head, rows[most:])}"
    return f"{_table(head, rows[:most])}<details>{rest}</details>"


def _bar(value: float, low: float, high: float) -> str:
    """A bar from zero to the value, on the scale from `low` to `high` of all bars."""
    width = (high - low) or 1.0
    left, right = (min(0.0, value) - low) / width, (max(0.0, value) - low) / width
    return f'<span class="bar"><i style="left:{left:.2%};width:{right - left:.2%}"></i></span>'


def _number(value: float) -> str:
    return _units(analysis.shown_units(value))


def _units(units: int, sign: bool = False) -> str:
    text = f"{units / 10**analysis.DIGITS:{'+' if sign else ''}.{analysis.DIGITS}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _percents(box_xyxy: np.ndarray) -> str:
    return " ".join(f"{100 * x:.0f}" for x in box_xyxy)


def _colour(number: int) -> str:
    return html_lib.REGION_COLOURS[number % len(html_lib.REGION_COLOURS)]


def _tag(number: int) -> str:
    return f'<span class="tag" style="--c:{_colour(number)}">{number + 1}</span>'
