"""Outlines as float arrays [points, 2] of (x, y), y downwards: everything is drawn as polygons."""

import numpy as np


def curve(*points, steps: int = 6) -> np.ndarray:
    """The closed Catmull-Rom curve through `points`."""
    p1 = np.asarray(points, float)[:, None]  # [points, 1, 2]
    p0, p2, p3 = np.roll(p1, 1, 0), np.roll(p1, -1, 0), np.roll(p1, -2, 0)
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    return _between(p0, p1, p2, p3, t).reshape(-1, 2)


def polygon(*points) -> np.ndarray:
    """Straight edges."""
    return np.asarray(points, float)


def ellipse(x, y, rx, ry=None, angle: float = 0, count: int = 28) -> np.ndarray:
    """An ellipse of radii `rx`, `ry` (without `ry` a circle), turned by `angle` degrees."""
    turns = np.linspace(0, 2 * np.pi, count, endpoint=False)
    points = np.stack([rx * np.cos(turns), (ry or rx) * np.sin(turns)], -1)
    return place(points, x, y, angle)


def place(points: np.ndarray, x=0, y=0, angle: float = 0, scale: float = 1) -> np.ndarray:
    """`points` scaled, turned clockwise by `angle` degrees and moved to (x, y)."""
    a = np.deg2rad(angle)
    turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    return points @ turn * scale + (x, y)


def grow(points: np.ndarray, width: float) -> np.ndarray:
    """The outline moved outwards by `width` (inwards if negative) along its normals."""
    before, after = np.roll(points, 1, 0), np.roll(points, -1, 0)
    area = np.sum(points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1])
    edge_in, edge_out = _unit(points - before), _unit(after - points)
    normal = edge_in + edge_out
    normal = _unit(np.stack([normal[:, 1], -normal[:, 0]], -1)) * np.sign(area)
    # Sharp corners stand out further, at most 1.7 times.
    sharp = np.sqrt(np.clip((1 + np.sum(edge_in * edge_out, -1)) / 2, 0.35, 1))
    return points + normal * (width / sharp)[:, None]


def stroke(points, start: float, end: float | None = None) -> np.ndarray:
    """The area of an open line through `points`, `start` wide at its first and `end` at its last."""
    line = np.asarray(points, float)
    if len(line) > 2:
        t = np.linspace(0, len(line) - 1, 4 * len(line))
        line = np.stack([_spline(line[:, axis], t) for axis in (0, 1)], -1)
    along = _unit(np.gradient(line, axis=0))
    half = np.linspace(start, start if end is None else end, len(line))[:, None] / 2
    across = np.stack([-along[:, 1], along[:, 0]], -1) * half
    return np.concatenate([line + across, (line - across)[::-1]])


def bands(points: np.ndarray, count: int, share: float, angle: float = 0) -> list[np.ndarray]:
    """`count` straight bands across a (roughly convex) outline, each `share` of its period wide."""
    turned = place(points, angle=-angle)
    low, high = turned[:, 1].min(), turned[:, 1].max()
    period = (high - low) / count
    made = []
    for number in range(count):
        top = low + (number + (1 - share) / 2) * period
        levels = np.linspace(top, top + share * period, 4)
        left, right = zip(*(_extent(turned, level) for level in levels), strict=True)
        band = np.concatenate([np.stack([left, levels], -1), np.stack([right, levels], -1)[::-1]])
        made.append(place(band, angle=angle))
    return made


def spots(points: np.ndarray, spacing: float, radius: float, angle: float = 0) -> list[np.ndarray]:
    """Round spots on a grid of rows `spacing` apart, all of them inside the outline."""
    inner = grow(place(points, angle=-angle), -radius - 0.4)
    low, high = inner.min(0), inner.max(0)
    made = []
    first = (low[1] + high[1]) / 2 % spacing + low[1] // spacing * spacing
    rows = np.arange(first, high[1], spacing * 0.87)
    for row, y in enumerate(rows):
        for x in np.arange(low[0] + (row % 2) * spacing / 2, high[0], spacing):
            if np.sum(_crossings(inner, y) < x) % 2:  # inside
                made.append(place(ellipse(x, y, radius, count=12), angle=angle))
    return made


def _unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def _spline(values, t):
    """The open Catmull-Rom curve through `values` at the times `t` in [0, len(values) - 1]."""
    padded = np.concatenate([[2 * values[0] - values[1]], values, [2 * values[-1] - values[-2]]])
    index = np.minimum(t.astype(int), len(values) - 2)
    f = t - index
    return _between(*(padded[index + k] for k in range(4)), f)


def _between(p0, p1, p2, p3, t):
    """The Catmull-Rom curve from `p1` to `p2`, at `t` in [0, 1]."""
    third = (3 * p1 - p0 - 3 * p2 + p3) * t**3
    return 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + third)


def _crossings(points, y):
    after = np.roll(points, -1, 0)
    crosses = (points[:, 1] <= y) != (after[:, 1] <= y)
    a, b = points[crosses], after[crosses]
    return np.sort(a[:, 0] + (y - a[:, 1]) / (b[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0]))


def _extent(points, y):
    crossings = _crossings(points, y)
    if not len(crossings):
        middle = points[:, 0].mean()
        return middle, middle
    return crossings[0], crossings[-1]
