"""Grids, zips and seeds for sweep files: plain Python on overrides such as {"optim.learning_rate": 1e-3}."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Point = dict[str, Any]


def grid(axes: Mapping[str, Iterable[Any]]) -> Iterator[Point]:
    """Every combination of the axes' values; the last axis changes fastest.

    Args:
      axes: config key -> its values.
    """
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values))


def zipped(axes: Mapping[str, Iterable[Any]]) -> Iterator[Point]:
    """The axes' first values together, then their second ones, and so on.

    Args:
      axes: config key -> its values, as many for each key.

    Raises:
      ValueError: the axes have different lengths.
    """
    columns = {key: list(values) for key, values in axes.items()}
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{key} has {len(column)}" for key, column in columns.items())
        raise ValueError(f"zipped: expected as many values for each key, {lengths}")
    for values in zip(*columns.values()):
        yield dict(zip(columns, values))


def product(*sweeps: Iterable[Point]) -> Iterator[Point]:
    """Every point of the first sweep with every point of the others; a later one's keys win."""
    for points in itertools.product(*map(list, sweeps)):
        yield {key: value for point in points for key, value in point.items()}


def seeds(count: int, points: Iterable[Point] = ({},)) -> Iterator[Point]:
    """Each point with the seeds 0 .. count-1."""
    yield from product(points, grid({"seed": range(count)}))
