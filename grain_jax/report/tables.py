"""Evaluation results as a table of text: what was measured, its 95% interval, chance, and how many it stands on."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

HEADER = ("measured", "value", "95% interval", "chance", "of")


class _Row(NamedTuple):
    """How a number of a result is shown."""

    key: str  # in the result; the interval is KEY_low, KEY_high
    label: str
    chance: str | None  # the key of its chance
    count: str  # the key of what it is a mean over
    unit: str  # of the count
    is_share: bool = True  # shown as per cent


_GROUNDING = (
    _Row("box_iou", "matched box IoU", "chance_box_iou", "regions_matched", "boxes", False),
    _Row("box_acc50", "matched box Acc@0.5", "chance_box_acc50", "regions_matched", "boxes"),
    _Row(
        "region_to_description_r1",
        "region to description R@1",
        "chance_region_to_description_r1",
        "regions_matched",
        "boxes",
    ),
    _Row("phrase_iou", "phrase to box IoU", "chance_phrase_iou", "regions", "phrases", False),
    _Row("phrase_acc50", "phrase to box Acc@0.5", "chance_phrase_acc50", "regions", "phrases"),
)


def describe(results: Mapping[str, Mapping[str, float]]) -> str:
    """The table of several results, e.g. {"unseen": {"alpha_0.5/top1": 0.78, "chance": 0.025, ...}}.

    Args:
      results: name -> the numbers of an evaluation, as `evaluate.base.run` returns them.
    """
    rows: list[tuple[str, ...]] = []
    for name, numbers in results.items():
        shown = [row for row in _rows(numbers) if row.key in numbers]
        if not shown:  # of no kind that is known here: every number as it is
            shown = [_Row(key, key, None, "", "", False) for key in numbers]
        rows += [_cells(name.replace("_", " "), numbers, row) for row in shown]
    return table(HEADER, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right, under a ruled header."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in [header, *rows]
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join(line.rstrip() for line in [lines[0], rule, *lines[1:]])


def _rows(numbers: Mapping[str, float]) -> list[_Row]:
    rows = []
    for key in numbers:  # alphas in the order in which they were asked for
        if key.startswith("alpha_") and key.endswith("/top1"):
            at = key.removesuffix("/top1")
            alpha = f"alpha {float(at.removeprefix('alpha_')):g}"
            rows.append(_Row(key, f"top-1, {alpha}", "chance", "pictures", "pictures"))
            rows.append(
                _Row(f"{at}/top5", f"top-5, {alpha}", "chance_top5", "pictures", "pictures")
            )
    for way, label, count, unit in (
        ("image_to_text", "image to text", "pictures", "pictures"),
        ("text_to_image", "text to image", "captions", "captions"),
    ):
        for k in (1, 5, 10):
            rows.append(_Row(f"{way}/r{k}", f"{label} R@{k}", f"{way}/chance_r{k}", count, unit))
    return rows + list(_GROUNDING)


def _cells(name: str, numbers: Mapping[str, float], row: _Row) -> tuple[str, ...]:
    show = (lambda x: f"{x:.1%}") if row.is_share else (lambda x: f"{x:.3f}")
    low, high = numbers.get(f"{row.key}_low"), numbers.get(f"{row.key}_high")
    return (
        f"{name}: {row.label}",
        show(numbers[row.key]),
        "" if low is None or high is None else f"{100 * low:.1f} - {100 * high:.1f}%",
        show(numbers[row.chance]) if row.chance in numbers else "",
        f"{numbers[row.count]:.0f} {row.unit}" if row.count in numbers else "",
    )
