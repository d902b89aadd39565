"""inspect.html: one self-contained file with statistics, problems and the contact sheet."""

from collections.abc import Sequence
from html import escape
from typing import Any

from etils import epath

from grain_jax.core import html
from grain_jax.data.inspect import panels, problems, statistics

_FREQUENT = 12  # texts listed of each kind, if several images have them


def render(
    result: dict[str, Any], found: Sequence[problems.Problem], shown: Sequence[panels.Panel]
) -> str:
    """The HTML of the page.

    Args:
      result: as `statistics.Statistics.result` returns it.
      found: the problems.
      shown: the images of the contact sheet; may be none.
    """
    contents = {
        "Problems": _problems(found),
        "Texts": _texts(result),
        "Padding": _padding(result["padding"]),
        "Regions": _regions(result),
        "Images": _images(result),
        "Frequent texts": _frequent(result),
        "Contact sheet": _sheet(result, shown),
    }
    path, here = result["set"]["path"], epath.Path(__file__).parent
    return html.document(
        title=f"{path}: grain-jax inspect",
        header=f'<div><h1>Data set</h1><p class="soft"><code>{escape(path)}</code>'
        f" ({escape(result['set']['kind'])}{_shards(result['set'])})</p></div>{_tiles(result, found)}",
        sections=[
            html.Section(name.lower().replace(" ", "-"), name, content)
            for name, content in contents.items()
        ],
        files=[here / "page.css", here / "page.js"],
    )


def _shards(described: dict[str, Any]) -> str:
    shards = described["shards"]
    out = ""
    if shards["count"]:
        out = f", {shards['count']} shards of {shards['smallest']:,} to {shards['largest']:,}"
    for key, value in described["metadata"].items():
        out += f", {escape(key.replace('_', ' '))} {escape(_note(value))}"
    return out


def _note(value: Any) -> str:
    """A note of a build; of the passes that annotated its images, their models."""
    each = value if isinstance(value, list) else [value]
    passes = [one.get("passes") if isinstance(one, dict) else None for one in each]
    if not all(isinstance(own, dict) for own in passes):
        return str(value)
    noted = (item for own in passes if own for item in own.items())
    models = (f"{k}: {of['model']}" for k, of in noted if isinstance(of, dict) and "model" in of)
    return ", ".join(dict.fromkeys(models))


def _tiles(result: dict[str, Any], found: Sequence[problems.Problem]) -> str:
    images, regions, captions = result["pictures"], result["regions"], result["captions"]
    count = max(images["count"], 1)
    size = f"{images['bytes'] / 1e6:,.1f} MB"
    if images["left_out"]:
        size += f"; {images['left_out']:,} left out"
    if images["turned"]:
        size += f"; {images['turned']:,} with an EXIF orientation"
    tiles = [(images["count"], "images", size)]
    for kind in ("web", "synthetic"):
        share = f"{captions[f'pictures_with_{kind}'] / count:.1%} of the images"
        tiles.append((captions[kind]["words"]["count"], f"{kind} captions", share))
    different = result["descriptions"]["distinct"]
    tiles += [
        (regions["count"], "regions", f"{regions['count'] / count:.2f} an image"),
        (different["distinct"], "different descriptions", _exact(different)),
        (len(found), "kinds of problems", "see below" if found else "none found"),
    ]
    cells = (f"<div><b>{n:,}</b>{label}<span>{more}</span></div>" for n, label, more in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _exact(distinct: dict[str, Any]) -> str:
    return "exact count" if distinct["exact"] else "an estimate from a share of them"


def _problems(found: Sequence[problems.Problem]) -> str:
    if not found:
        return '<p class="right">None found.</p>'
    rows = [
        (
            f'<span class="problem">{escape(p.what)}</span>',
            f"{p.count:,}",
            f"{p.count / p.of:.2%}" if p.of else "",
            escape(p.example),
            escape(p.advice),
        )
        for p in found
    ]
    classes = ("", "number", "number", "example", "")
    return html.table(("what", "count", "share", "first example", "what to do"), rows, classes)


def _histogram(title: str, numbers: dict[str, Any], unit: str, more: str = "") -> str:
    if not numbers["count"]:
        return f'<figure><h3>{title}</h3><p class="soft">none</p></figure>'
    values = []
    first_low, first_high, _ = numbers["histogram"][0]
    for low, high, n in numbers["histogram"]:
        rest = "+" if high - low > first_high - first_low else ""  # all the longest ones
        values.append((f"{low:,}{rest}", f"{low:,}" if low == high else f"{low:,} to {high:,}", n))
    spread = (
        f"mean {numbers['mean']:.1f}, median {numbers['median']:,}, 95% up to {numbers['p95']:,},"
        f" 99% up to {numbers['p99']:,}, longest {numbers['max']:,} {unit}"
    )
    return html.figure(title, html.histogram(values, f"{title}: {spread}"), spread + more)


def _kinds(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    of_captions = {
        f"{kind.title()} captions": result["captions"][kind] for kind in ("web", "synthetic")
    }
    return {**of_captions, "Descriptions": result["descriptions"]}


def _texts(result: dict[str, Any]) -> str:
    figures = [
        _histogram(f"{name} in {unit}", numbers[unit], unit)
        for unit in ("words", "tokens")
        for name, numbers in _kinds(result).items()
        if numbers["words"]["count"]
    ]
    return (
        f'<div class="charts">{"".join(figures)}</div>'
        '<p class="soft">Tokens are CLIP\'s, with start and end token.</p>'
    )


def _padding(padding: dict[str, Any]) -> str:
    if not padding["groups"]:
        return '<p class="soft">No texts.</p>'
    rows = [
        (
            str(g["group"]),
            str(g["rows"]),
            f"{g['padding']:.1%}",
            f'<span class="share" style="width:{100 * g["padding"]:.0f}%"></span>',
            f"{g['overflowing']:.2%}",
            f"{g['groups']:,}",
        )
        for g in padding["groups"]
    ]
    header = (
        "text.pack_group",
        "rows needed",
        "padding",
        "",
        "texts that do not fit",
        "groups tried",
    )
    classes = ("number", "number", "number", "bar", "number", "number")
    table = html.table(header, rows, classes, table_class="narrow")
    return (
        f"{table}<p>These are the rows that training derives where <code>text.pack_rows</code> is not set: at"
        f" most 0.1% of the texts do not fit. One text a row would be {padding['unpacked']:.1%} padding.</p>"
        '<p class="soft">Packed by the code of training, with each image\'s caption (web and synthetic'
        " in turn) and its five regions of the highest score, in a mixed order.</p>"
    )


def _regions(result: dict[str, Any]) -> str:
    boxes, scores, regions = result["boxes"], result["scores"], result["regions"]
    areas = [
        (f"<{100 * high:g}%", f"{100 * low:g}% to {100 * high:g}%", n)
        for low, high, n in boxes["area_histogram"]
    ]
    spread = "none"
    if scores["count"]:
        spread = f"mean {scores['mean']:.2f}, {scores['min']:.2f} to {scores['max']:.2f}"
    binned = [(f"{low:.2f}", f"{low:.2f} to {high:.2f}", n) for low, high, n in scores["histogram"]]
    most, beyond = max(map(max, boxes["places"])), regions["beyond_max_regions"]
    note = f"; {beyond:,} regions are beyond the 5 that training keeps" if beyond else ""
    figures = [_histogram("Regions an image", regions["per_picture"], "regions", note)]
    if regions["with_negatives"]:
        note = f"; {regions['with_negatives'] / regions['count']:.1%} of the regions have some"
        numbers = regions["negatives_per_region"]
        figures.append(_histogram("Negatives a region", numbers, "negatives", note))
    shapes = html.heat_map(boxes["shapes"], "box shapes", from_below=True)
    for title, chart, caption in (
        ("Box area, share of the image", html.histogram(areas, "box areas"), "bars are not of equal width: each covers about half a decade"),
        ("Scores", html.histogram(binned, f"scores: {spread}"), spread),
        ("Where boxes are", html.heat_map(boxes["places"], "where boxes are"), f"share of the boxes that cover a place, 0 to {most:.0%}"),
        ("Width and height of boxes", shapes, "width from left to right, height from the bottom up, 0 to the whole image"),
    ):  # fmt: skip
        figures.append(html.figure(title, chart, caption))
    return f'<div class="charts">{"".join(figures)}</div>'


def _images(result: dict[str, Any]) -> str:
    images, copies = result["pictures"], result["duplicate_pictures"]
    count = max(images["count"], 1)
    formats = ", ".join(f"{escape(k)} {n:,}" for k, n in images["formats"].items())
    sizes = ", ".join(f"{escape(size)} ({n / count:.0%})" for size, n in images["sizes"][:6])
    figures = "".join(
        _histogram(f"{side.title()} in pixels", images[side], "pixels")
        for side in ("width", "height")
        if len(images[side]["histogram"]) > 1
    )
    return (
        f'<div class="charts">{figures}</div><p>{formats}. Most frequent sizes: {sizes}.</p>'
        f"<p>{copies['copies']:,} images are copies of earlier ones, byte by byte ({_exact(copies)}).</p>"
        f"{''.join(f'<p>{escape(line)}.</p>' for line in statistics.shape_lines(images['shapes']))}"
    )


def _frequent(result: dict[str, Any]) -> str:
    count, parts = max(result["pictures"]["count"], 1), []
    for name, texts in _kinds(result).items():
        distinct = texts["distinct"]
        if not distinct["total"]:
            continue
        frequent = [(text, n) for text, n in texts["most_frequent"][:_FREQUENT] if n > 1]
        rows = [(escape(text), f"{n:,}", f"{n / count:.1%}") for text, n in frequent]
        note = (
            f"{distinct['distinct']:,} different ones of {distinct['total']:,} ({_exact(distinct)})"
        )
        if texts["most_frequent_too_low_by"]:
            note += f"; counts are too low by at most {texts['most_frequent_too_low_by']:,}"
        columns = ("text", "images", "share"), rows, ("", "number", "number")
        table = html.table(*columns) if rows else ""
        parts.append(f'<div><h3>{name}</h3><p class="soft">{note}</p>{table}</div>')
    return f'<div class="columns">{"".join(parts)}</div>'


def _sheet(result: dict[str, Any], shown: Sequence[panels.Panel]) -> str:
    if not shown:
        return '<p class="soft">No images.</p>'
    return (
        f'<p class="soft">{len(shown)} of {result["pictures"]["count"]:,} images, drawn by the hash of'
        " their ids. Regions are numbered by score. Point at a description, or focus an image and press"
        ' the up and down arrows, to see its box alone.</p><div class="cards">'
        + "".join(map(_panel, shown))
        + "</div>"
    )


def _panel(panel: panels.Panel) -> str:
    width, height = panel.image.size
    # The numbers are drawn after all boxes, so that no line crosses them.
    boxes = "".join([*map(_box, panel.marks), *map(_badge, panel.marks)])
    captions = "".join(
        f'<p class="caption">{kind}: <q>{escape(text)}</q></p>' for kind, text in panel.captions
    )
    lines = ""
    for mark in panel.marks:
        negatives = f"<br>not: {escape(mark.negatives)}" if mark.negatives else ""
        lines += (
            f'<li data-region="{mark.number}"><b class="badge" style="background:{mark.colour}">{mark.number}</b>'
            f'<span>{escape(mark.description)} <span class="soft">{mark.score:.2f}{negatives}</span></span></li>'
        )
    more = f'<p class="caption">and {panel.more} more regions</p>' if panel.more else ""
    name = escape(panel.name)
    return (
        f'<figure class="card" tabindex="0" aria-label="{name}"><div class="image">'
        f'<img src="{html.data_uri(panel.image)}" width="{width}" height="{height}" alt="{name}">'
        f'<svg class="boxes" viewBox="0 0 {width} {height}" aria-hidden="true">{boxes}</svg></div>'
        f'<p>{name} <span class="soft">{panel.size[0]} x {panel.size[1]}</span></p>'
        f'{captions}<ol class="said">{lines}</ol>{more}</figure>'
    )


def _box(mark: panels.Mark) -> str:
    x1, y1, x2, y2 = mark.box_xyxy
    box = f'x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}"'
    rects = f'<rect class="halo" {box}/><rect class="line" {box} stroke="{mark.colour}"/>'
    return f'<g data-region="{mark.number}">{rects}</g>'


def _badge(mark: panels.Mark) -> str:
    (x, y), (width, height) = mark.badge_xy, (mark.badge_width, panels.BADGE[1])
    size = f'width="{width}" height="{height}" fill="{mark.colour}"'
    text = f'<text x="{x + width / 2:.1f}" y="{y + height / 2:.1f}">{mark.number}</text>'
    return f'<g data-region="{mark.number}"><rect x="{x:.1f}" y="{y:.1f}" {size}/>{text}</g>'
