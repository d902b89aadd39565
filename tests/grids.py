"""Parameters of a test: some cases of a grid in the suite, the others with `-m slow`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def some_of(axes: Mapping[str, Sequence[Any]], *chosen: tuple) -> pytest.MarkDecorator:
    """A test of the product of `axes`, name -> values, of which all but the `chosen` cases are slow."""
    cases = list(itertools.product(*axes.values()))
    assert set(chosen) <= set(cases), "a case that the grid has not got"
    marks = {True: (), False: pytest.mark.slow}
    params = [pytest.param(*case, marks=marks[case in chosen]) for case in cases]
    return pytest.mark.parametrize(",".join(axes), params)
