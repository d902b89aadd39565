"""The curves of a run: which of them share a chart, and the chart as SVG."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from grain_jax import losses
from grain_jax.core import html

Curve = tuple[Sequence[float], Sequence[float]]  # steps, values

_HEADLINES = {  # last part of the key of a main number -> label
    "/top1": "top-1",
    "/r1": "R@1",
    "/box_iou": "box IoU",
    "/region_to_description_r1": "region to description R@1",
    "/phrase_acc50": "phrase to box Acc@0.5",
    "/miou": "mIoU",
}
_GROUPS = {  # title of a chart -> how the names of its curves begin
    "Share of the matched regions, by query": ("query_share/",),
    "Regions": ("query_", "matched_", "region_description_accuracy"),
    "Gradient norms": ("grad_norm",),
    "Waiting for input": ("input_wait_",),
    "Accuracies": ("image_", "hard_negative_", "box_description_"),
}
_BOOKKEEPING = ("eval/", "time/", "process/", "texts", "model_flops_per_second")  # have no chart of their own
_POINTS = 400  # of a curve, at most
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 420, 190, 64, 20  # of a chart, in its own units
_COLOURS = 8  # --c0 to --c7 of core/base.css


class Chart(NamedTuple):
    """Curves that share a chart."""

    title: str
    labels: dict[str, str]  # key of metrics.jsonl -> label


def charts(series: Mapping[str, Curve]) -> list[Chart]:
    """The charts in the order of the page."""
    evaluated = {}
    for key, ending in itertools.product(series, _HEADLINES):
        if key.startswith("eval/") and key.endswith(ending) and len(series[key][0]) > 1:
            _, name, *group, _ = key.split("/")  # eval/unseen/alpha_0.5/top1 -> "unseen: top-1, alpha 0.5"
            label = f"{name}: {_HEADLINES[ending]}{', ' * bool(group)}{' '.join(group)}"
            evaluated[key] = label.replace("_", " ")
    made = [Chart("Losses", losses.labels_of(list(series))), Chart("Evaluations", evaluated)]
    left = [key for key in series if key not in made[0].labels and not key.startswith(_BOOKKEEPING)]
    for title, beginnings in _GROUPS.items():
        labels = {key: key for key in left if key.startswith(beginnings)}
        made.append(Chart(title, labels))
        left = [key for key in left if key not in labels]
    made += [Chart(key.replace("_", " "), {key: key}) for key in left]
    return [chart for chart in made if chart.labels]


def figures(series: Mapping[str, Curve]) -> str:
    """All charts but those whose curves are all flat."""
    shown = [x for x in charts(series) if any(len(set(series[key][1])) > 1 for key in x.labels)]
    return "".join(svg(chart, series) for chart in shown)


def svg(chart: Chart, series: Mapping[str, Curve]) -> str:
    """A chart as a figure, with the last value of each curve below."""
    curves = {key: [*map(_thinned, series[key])] for key in chart.labels}
    steps, values = ([x for curve in curves.values() for x in curve[i]] for i in (0, 1))
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    across = (_WIDTH - _LEFT - 8) / ((last - first) or 1)
    down = (_HEIGHT - _BOTTOM - 10) / ((high - low) or 1)
    lines, legend = [], []
    for i, (key, label) in enumerate(chart.labels.items()):
        colour = f"var(--c{i % _COLOURS})"
        points = " ".join(
            f"{_LEFT + (x - first) * across:.1f},{_HEIGHT - _BOTTOM - (y - low) * down:.1f}"
            for x, y in zip(*curves[key])
        )
        said = f"{label} {series[key][1][-1]:.4g}"
        shape = f'points="{points}" style="stroke:{colour}"'
        lines.append(f"<polyline {shape}><title>{html.text(said)}</title></polyline>")
        legend.append(f'<span><i style="background:{colour}"></i>{html.text(said)}</span>')
    ends = (
        f'<text x="{_LEFT - 5}" y="{y}" text-anchor="end">{_short(value)}</text>'
        for y, value in ((_HEIGHT - _BOTTOM, low), (16, high))
    )
    return (
        f"<figure><h3>{html.text(chart.title)}</h3>"
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        f' aria-label="{html.text(chart.title)}">'
        f'<path class="axis" d="M{_LEFT} 10V{_HEIGHT - _BOTTOM}H{_WIDTH - 8}"/>{"".join(ends)}'
        f'<text x="{_LEFT}" y="{_HEIGHT - 5}">step {first:,}</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 5}" text-anchor="end">{last:,}</text>'
        f'{"".join(lines)}</svg><figcaption class="legend">{"".join(legend)}</figcaption></figure>'
    )


def _short(value: float) -> str:
    """A number for an axis, at most nine characters."""
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.3g}")


def _thinned(values: Sequence[float]) -> Sequence[float]:
    """At most _POINTS evenly spaced ones, the last one included."""
    every = -(-len(values) // _POINTS) or 1
    return values[(len(values) - 1) % every :: every]
