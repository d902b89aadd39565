"""Bars and heat maps as SVG whose colours are the page's, so that they suit light and dark."""

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 360, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 16, 20
_MAP = 240  # pixels, a heat map's side


def bars(values: Sequence[tuple[str, str, int]], what: str) -> str:
    """A histogram.

    Args:
      values: (label below it, what it counts, count) of each bar from left to right; labels that
        find no room are left out.
      what: said to those who cannot see it.
    """
    most = max((count for _, _, count in values), default=0)
    if not most:
        return '<p class="soft">none</p>'
    inner = _WIDTH - _LEFT - _RIGHT
    step = min(inner / len(values), 48)
    high = _HEIGHT - _TOP - _BOTTOM
    base = _HEIGHT - _BOTTOM
    parts = []
    for i, (_, meaning, count) in enumerate(values):
        tall = count / most * high
        parts.append(
            f'<rect class="bar" x="{_LEFT + i * step:.1f}" y="{base - tall:.1f}"'
            f' width="{max(step - 1, 0.6):.1f}" height="{tall:.1f}">'
            f"<title>{escape(meaning)}: {count:,}</title></rect>"
        )
    every = max(1, -(-len(values) // 8)) if step < 40 else 1
    for i in range((len(values) - 1) % every, len(values), every):  # the last one always
        x = _LEFT + (i + 0.5) * step
        label = escape(values[i][0])
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{label}</text>')
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(what)}">'
        f'<path class="axis" d="M{_LEFT} {base + 0.5}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT}" y="11">{most:,}</text>{"".join(parts)}</svg>'
    )


def heat_map(cells: Sequence[Sequence[float]], what: str, *, from_below: bool = False) -> str:
    """A square of cells, the darker the larger; the first row on top, or at the bottom."""
    most = max((max(row) for row in cells), default=0)
    if not most:
        return '<p class="soft">none</p>'
    side = _MAP / len(cells)
    parts = []
    for y, row in enumerate(reversed(cells) if from_below else cells):
        for x, value in enumerate(row):
            if value:
                parts.append(
                    f'<rect class="cell" x="{x * side:.1f}" y="{y * side:.1f}" width="{side:.1f}"'
                    f' height="{side:.1f}" fill-opacity="{value / most:.2f}">'
                    f"<title>{value:.1%}</title></rect>"
                )
    return (
        f'<svg class="chart" viewBox="0 0 {_MAP} {_MAP}" style="max-width:{_MAP}px" role="img"'
        f' aria-label="{escape(what)}"><path class="axis" d="M.5 .5H{_MAP - 0.5}V{_MAP - 0.5}H.5Z"/>'
        f"{''.join(parts)}</svg>"
    )
