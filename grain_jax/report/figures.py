"""The PNG figures of a run (curves; test images with boxes and descriptions) and the printed table of results."""

import io
import itertools
import json
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from etils import epath
from matplotlib import patches, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grain_jax.core import annotations as annotations_lib
from grain_jax.core import printable, regular_file
from grain_jax.evaluate import evaluators, tables, test_sets
from grain_jax.report import charts, regions, run_files
from grain_jax.runtime import metrics_file, processes

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#e67e00", "#0c8c96", "#c2388f", "#7a4b2a")
_CURVES = ("#333333", COLOURS[1], COLOURS[4], COLOURS[2], COLOURS[3], *COLOURS[5:])
_MOST_CHARTS = 60  # of curves.png; more pixels than that cannot be drawn
_COLUMNS = 4  # of the grid
_CELL = 3.2  # side of an image in the grid, inches
_LINE = 42  # characters of text under an image
_LONGEST = 240  # characters of a text; longer ones are cut off
_LINE_HEIGHT = 0.165  # of text, inches
_PIXELS = 360  # least longer side of an image as drawn


# Matplotlib would read the text between two $ of a description as a formula.
_texts_as_they_are = matplotlib.rc_context({"text.parse_math": False})


def print_table(results: Mapping[str, float], kinds: Mapping[str, str]) -> None:
    """Prints the final table of a run.

    Args:
      results: `eval/NAME/KEY`, as in metrics.jsonl -> value.
      kinds: NAME -> the kind of its evaluator.
    """
    numbers = run_files.by_evaluation(results)
    print(tables.describe({name: (kinds.get(name, ""), of) for name, of in numbers.items()}))


@_texts_as_they_are
def curves(metrics_jsonl: epath.PathLike, output_png: epath.PathLike) -> None:
    """Draws the curves of a run, in the charts of the report, and its last evaluations as bars, if it has any.

    What is 0 throughout is left out.

    Args:
      metrics_jsonl: the run's `metrics.jsonl`; lines that are no records of a step are skipped. `config.json` beside
        it says where the caption loss is at chance.
      output_png: the file to write.
    """
    series = metrics_file.series(metrics_file.read([epath.Path(metrics_jsonl)])[0])
    evaluations = max((len(series[key][0]) for key in series if key.startswith("eval/")), default=0)
    told = [key for key, (_, values) in series.items() if any(values)]
    made = charts.charts(told, evaluations)[:_MOST_CHARTS]
    rows = max(2, -(-len(made) // 3))
    figure = Figure(figsize=(16, 3.6 * rows), layout="constrained", dpi=110)
    widths = [1, 1, 1, 1.05] if evaluations else [1, 1, 1]
    grid = figure.add_gridspec(rows, len(widths), width_ratios=widths)
    for i, chart in enumerate(made):
        axis = _framed(figure.add_subplot(grid[i // 3, i % 3]), chart.title)
        _lines(axis, chart, series)
        if chart.title == "Losses":
            _mark_chance(axis, _caption_loss_at_chance(epath.Path(metrics_jsonl).parent))
    if evaluations:
        bars = _framed(figure.add_subplot(grid[:2, 3]), "Last evaluation (black line: chance)")
        _bars(bars, {key: values[-1] for key, (_, values) in series.items()})
    _save(figure, output_png)


@processes.alone()
@_texts_as_they_are
def regions_grid(
    predictor: Any,
    annotations: epath.PathLike,
    images_dir: epath.PathLike,
    output_png: epath.PathLike,
    count: int = 12,
    orientation: str = "exif",
) -> None:
    """Draws test images with their predicted and annotated boxes, and the nearest description of each region.

    A predicted box (solid) and the annotated box (dashed) that it is matched to have one colour. The text in that
    colour is the description nearest to the region, of all distinct descriptions of the file.

    Args:
      predictor: the model (see `evaluate.encode.Predictor`).
      annotations: `A.jsonl`.
      images_dir: the folder that the paths in the annotations are relative to.
      output_png: the file to write.
      count: number of images, evenly spaced among those with regions.
      orientation: of the images, as of `core.images`.

    Raises:
      test_sets.InputError, annotations.AnnotationError: no image of the file can be drawn.
    """
    records = [r for r in annotations_lib.read(annotations).records if r.regions]
    if not records:
        raise test_sets.InputError(f"{annotations}: no line has a region; there is nothing to draw")
    folder = evaluators.image_folder(images_dir)
    files = [test_sets.of_path(folder / r.image, orientation=orientation) for r in records]
    seen = regions.look(predictor, records, files, count)
    described, matched, texts = seen.described, seen.matched, seen.texts
    nearest = seen.similarity[matched.image, matched.query].argmax(axis=1)  # [n]

    captions = []  # for each image, a list of (colour, line)
    for i in range(len(seen.files)):
        mine = np.flatnonzero(matched.image == i)
        captions.append(_wrapped(texts, nearest[mine], seen.own_text[mine]))
    figure, axes = _grid(
        captions,
        "solid: predicted box,  dashed: annotated box,"
        f"  text: nearest of {len(texts)} descriptions (\N{CHECK MARK} its own, \N{BALLOT X} another's)",
    )
    for i, (file, (above, below)) in enumerate(zip(seen.files, axes)):
        image = file.load().convert("RGB")
        _draw_image(above, image)
        predicted_xyxy = seen.boxes_xyxy[i, matched.query[matched.image == i]]
        true_xyxy = described.boxes_xyxy[described.image == i]  # ordered as the matches are
        for boxes in zip(true_xyxy, predicted_xyxy, itertools.cycle(COLOURS)):
            _draw_box(above, boxes[0], image.size, boxes[2], dashed=True)
            _draw_box(above, boxes[1], image.size, boxes[2], dashed=False)
        below.set_axis_off()
        height = below.get_position().height * figure.get_figheight()
        for j, (colour, line) in enumerate(captions[i]):
            y = 1 - (0.06 + j * _LINE_HEIGHT) / height
            below.text(0.01, y, line, color=colour, fontsize=9, va="top")
    _save(figure, output_png)


def _wrapped(texts: Sequence[str], nearest: np.ndarray, truth: np.ndarray) -> list[tuple[str, str]]:
    """The nearest description of each region, (colour, line) pairs; and the annotated one where it is another.

    Both are positions in `texts`, int [n].
    """
    lines = []
    for j, positions in enumerate(zip(nearest, truth)):
        said, own = (printable.plain(texts[int(i)], _LONGEST) for i in positions)
        right = positions[0] == positions[1]
        text = f"\N{CHECK MARK} {said}" if right else f"\N{BALLOT X} {said} (annotated: {own})"
        colour = COLOURS[j % len(COLOURS)]
        lines += [(colour, part) for part in textwrap.wrap(text, _LINE, subsequent_indent="    ")]
    return lines


def _grid(captions: Sequence[Sequence[Any]], title: str) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """A figure, and (axes of the image, axes of its text) for each image; a row is as high as its longest text."""
    columns = min(_COLUMNS, len(captions))
    heights = []  # inches: image, lines, image, lines ...
    for i in range(0, len(captions), columns):
        longest = max(map(len, captions[i : i + columns]))
        heights += [_CELL - 0.1, 0.3 + _LINE_HEIGHT * longest]
    title = textwrap.fill(title, _LINE * columns)
    top = 0.25 + 0.2 * len(title.splitlines())
    height, side = sum(heights) + top, 0.05 / columns
    figure = Figure(figsize=(_CELL * columns, height), dpi=110)
    place = dict(left=side, right=1 - side, bottom=0.0, top=1 - top / height)
    grid = figure.add_gridspec(
        len(heights), columns, height_ratios=heights, wspace=0.03, hspace=0.0, **place
    )
    figure.suptitle(title, fontsize=10, y=1 - 0.12 / height, va="top")
    cells = (divmod(i, columns) for i in range(len(captions)))
    return figure, [
        (figure.add_subplot(grid[2 * r, c]), figure.add_subplot(grid[2 * r + 1, c]))
        for r, c in cells
    ]


def _draw_image(axis: Axes, image: PIL.Image.Image) -> None:
    scale = max(1.0, _PIXELS / max(image.size))
    larger = image.resize(
        [round(edge * scale) for edge in image.size], PIL.Image.Resampling.LANCZOS
    )
    axis.imshow(larger, extent=(0, image.width, image.height, 0))
    axis.set_axis_off()


def _draw_box(axis: Axes, box_xyxy, size: tuple[int, int], colour: str, *, dashed: bool) -> None:
    x1, y1, x2, y2 = np.asarray(box_xyxy) * (*size, *size)
    look: dict[str, Any] = dict(linewidth=1.5, linestyle=(0, (4, 2.5)))
    if not dashed:
        halo = patheffects.withStroke(linewidth=3.5, foreground="white", alpha=0.75)
        look = dict(linewidth=2.1, path_effects=[halo])
    box = patches.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, **look)
    box.set_clip_on(False)
    axis.add_patch(box)


def _framed(axis: Axes, title: str) -> Axes:
    axis.set_title(printable.plain(title, _LONGEST), fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)
    return axis


def _lines(axis: Axes, chart: charts.Chart, series) -> None:
    for i, (key, label) in enumerate(chart.series.items()):
        steps, values = series[key]
        look: Any = dict(color=_CURVES[i % len(_CURVES)], marker="" if steps[1:] else "o")
        if chart.noisy:
            axis.plot(steps, values, alpha=0.25, linewidth=0.8, **look)
        shown = _smooth(values) if chart.noisy else values
        axis.plot(steps, shown, label=printable.plain(label, _LONGEST), linewidth=1.5, **look)
    if len(chart.series) > 1:
        axis.legend(fontsize=7, frameon=False)
    values = [value for key in chart.series for value in series[key][1]]
    if chart.log and min(values) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")  # no formula, see _texts_as_they_are
        axis.yaxis.set_minor_formatter("")
    elif min(values) >= 0:
        axis.set_ylim(bottom=0)
    axis.set_xlabel("step", fontsize=8)


def _mark_chance(axis: Axes, chance: tuple[float, str] | None) -> None:
    if chance:
        label = f"{chance[1]}: captions not learned"
        axis.axhline(chance[0], color=COLOURS[1], linestyle=":", linewidth=1, label=label)
        axis.legend(fontsize=7, frameon=False)


def _bars(axis: Axes, last: dict[str, float]) -> None:
    keys = charts.headlines(last)
    for i, key in enumerate(keys):
        value, chance = last[key], charts.chance(last, key)
        axis.barh(i, value, height=0.42, color=_CURVES[i % len(_CURVES)])
        axis.text(value + 0.015, i, f"{value:.3f}", va="center", fontsize=8)
        label = printable.plain(charts.headline(key), _LONGEST)
        axis.text(0.0, i - 0.26, label, va="bottom", fontsize=8)
        if chance is not None:
            axis.plot([chance, chance], [i - 0.21, i + 0.21], color="black", linewidth=1.6)
    axis.set_yticks([])
    axis.set_ylim(len(keys) - 0.5, -0.8)
    axis.set_xlim(0, 1.1)


def _smooth(values: Sequence[float], keep: float = 0.6) -> list[float]:
    """Exponential moving average, with the correction for its start (as in Adam)."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def _caption_loss_at_chance(workdir: epath.Path) -> tuple[float, str] | None:
    """The caption loss of a run whose embeddings say nothing, where no caption is missing; and how it is written."""
    try:
        config = json.loads(regular_file.read_text(workdir / "config.json", "a config"))
        images = int(config["batch_size"])
        captions = int(config.get("input", {}).get("captions_per_image", 1))
        if captions == 1:
            return math.log(images), f"ln {images}"
        others = 1 + captions * (images - 1)  # an image's choices; a caption has `images`
        return math.log(images * others) / 2, f"ln √({images} x {others})"
    except (ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError):
        return None  # curves are drawn without a config too


def _save(figure: Figure, path: epath.PathLike) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Characters that the font lacks, such as emoji, are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support .* natively")
        figure.savefig(buffer, format="png")
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
