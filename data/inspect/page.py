"""inspect.html: one self-contained file with statistics, problems and the contact sheet."""

from collections.abc import Sequence
from html import escape
from typing import Any

from etils import epath

from grain_jax.core import html
from grain_jax.data.inspect import panels, problems

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
        out += f", {escape(key.replace('_', ' '))} {escape(str(value))}"
    return out


def _tiles(result: dict[str, Any], found: Sequence[problems.Problem]) -> str:
    images, regions, captions = result["pictures"], result["regions"], result["captions"]
    count = max(images["count"], 1)
    size = f"{images['bytes'] / 1e6:,.1f} MB"
    if images["left_out"]:
        size += f"; {images['left_out']:,} left out"
    if images["turned"]:
        size += f"; {images['turned']:,} with an EXIF orientation"
    tiles = [
        (f"{images['count']:,}", "images", size),
        (f"{captions['web']['words']['count']:,}", "web captions", f"{captions['pictures_with_web'] / count:.1%} of the images"),
        (f"{captions['synthetic']['words']['count']:,}", "synthetic captions", f"{captions['pictures_with_synthetic'] / count:.1%} of the images"),
        (f"{regions['count']:,}", "regions", f"{regions['count'] / count:.2f} an image"),
        (f"{result['descriptions']['distinct']['distinct']:,}", "different descriptions", _exact(result["descriptions"]["distinct"])),
        (f"{len(found)}", "kinds of problems", "see below" if found else "none found"),
    ]  # fmt: skip
    return '<div class="tiles">' + "".join(
        f"<div><b>{number}</b>{label}<span>{detail}</span></div>" for number, label, detail in tiles
    ) + "</div>"  # fmt: skip


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


def _histogram(title: str, numbers: dict[str, Any], unit: str) -> str:
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
    return html.figure(title, html.histogram(values, f"{title}: {spread}"), spread)


def _texts(result: dict[str, Any]) -> str:
    kinds = {
        "Web captions": result["captions"]["web"],
        "Synthetic captions": result["captions"]["synthetic"],
        "Descriptions": result["descriptions"],
    }
    figures = [
        _histogram(f"{name} in {unit}", numbers[unit], unit)
        for unit in ("words", "tokens")
        for name, numbers in kinds.items()
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
    most = max(map(max, boxes["places"]))
    beyond = regions["beyond_max_regions"]
    note = f"; {beyond:,} regions are beyond the 5 that training keeps" if beyond else ""
    per_image = _histogram("Regions an image", regions["per_picture"], "regions")
    negatives = ""
    if regions["with_negatives"]:
        share = f"; {regions['with_negatives'] / regions['count']:.1%} of the regions have some"
        negatives = _histogram("Negatives a region", regions["negatives_per_region"], "negatives")
        negatives = negatives.replace("</figcaption>", f"{share}</figcaption>")
    return '<div class="charts">' + "".join(
        [
            per_image.replace("</figcaption>", f"{note}</figcaption>"),
            negatives,
            html.figure("Box area, share of the image", html.histogram(areas, "box areas"), "bars are not of equal width: each covers about half a decade"),
            html.figure("Scores", html.histogram(binned, f"scores: {spread}"), spread),
            html.figure("Where boxes are", html.heat_map(boxes["places"], "where boxes are"), f"share of the boxes that cover a place, 0 to {most:.0%}"),
            html.figure("Width and height of boxes", html.heat_map(boxes["shapes"], "box shapes", from_below=True), "width from left to right, height from the bottom up, 0 to the whole image"),
        ]
    ) + "</div>"  # fmt: skip


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
    )


def _frequent(result: dict[str, Any]) -> str:
    count = max(result["pictures"]["count"], 1)
    parts = []
    for name, texts in (
        ("Descriptions", result["descriptions"]),
        ("Web captions", result["captions"]["web"]),
        ("Synthetic captions", result["captions"]["synthetic"]),
    ):
        distinct = texts["distinct"]
        if not distinct["total"]:
            continue
        rows = [
            (escape(text), f"{n:,}", f"{n / count:.1%}")
            for text, n in texts["most_frequent"][:_FREQUENT]
            if n > 1
        ]
        note = (
            f"{distinct['distinct']:,} different ones of {distinct['total']:,} ({_exact(distinct)})"
        )
        if texts["most_frequent_too_low_by"]:
            note += f"; counts are too low by at most {texts['most_frequent_too_low_by']:,}"
        table = ""
        if rows:
            table = html.table(("text", "images", "share"), rows, ("", "number", "number"))
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
    return (
        f'<g data-region="{mark.number}"><rect class="halo" {box}/>'
        f'<rect class="line" {box} stroke="{mark.colour}"/></g>'
    )


def _badge(mark: panels.Mark) -> str:
    x, y = mark.badge_xy
    width, height = mark.badge_width, panels.BADGE[1]
    return (
        f'<g data-region="{mark.number}"><rect x="{x:.1f}" y="{y:.1f}" width="{width}"'
        f' height="{height}" fill="{mark.colour}"/>'
        f'<text x="{x + width / 2:.1f}" y="{y + height / 2:.1f}">{mark.number}</text></g>'
    )
