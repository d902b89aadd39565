"""Charts of `benchmarks.claim`."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.claim import design, measures
from benchmarks.claim.results import Result

_STYLE = {design.OURS: "#2ca02c", "clip_both": "#d62728"}


def draw_arms(main: Mapping[str, Sequence[Result]], path: pathlib.Path) -> None:
    """For each arm its seeds as dots and their mean as a bar: unseen classes by description, seen ones by name."""
    figure = Figure(figsize=(11, 0.5 * len(main) + 1.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = list(main)[::-1]
    seen = lambda r: r["seen_test/alpha_1.0/top1"]
    for axis, title, measure, key in (
        (
            left,
            "classes never seen, by description, alpha 1",
            measures.headline,
            "unseen_test/chance",
        ),
        (right, "seen classes, by name", seen, "seen_test/chance"),
    ):
        for y, label in enumerate(labels):
            values = [100 * measure(result) for result in main[label]]
            colour = _STYLE.get(main[label][0]["arm"], "#1f77b4")
            axis.barh(y, statistics.mean(values), height=0.55, color=colour, alpha=0.35)
            axis.plot(values, [y] * len(values), "o", color=colour, markersize=5)
            axis.text(max(values) + 2, y, f"{statistics.mean(values):.0f}", va="center", fontsize=9)
        axis.axvline(100 * main[labels[0]][0][key], color="#555555", linestyle=":")
        axis.set_xlim(0, 108)
        axis.set_xlabel("top-1, % (dotted: chance)", fontsize=9)
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(labels)), labels, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"![{path.stem}]({path})\n")
