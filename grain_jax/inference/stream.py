"""Many images through a model, in groups."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from grain_jax.inference.inputs import InputError

Item = TypeVar("Item")


def groups(items: Iterable[Item], size: int, counts: Callable[[Item], bool]) -> Iterator[list[Item]]:
    """Items in groups with `size` of those that count; the last group may have fewer."""
    group, number = [], 0
    for item in items:
        group.append(item)
        number += counts(item)
        if number == size:
            yield group
            group, number = [], 0
    if group:
        yield group


def check_finite(*embeds: np.ndarray) -> None:
    """Raises InputError where an embedding has numbers that are not finite."""
    if not all(np.isfinite(values).all() for values in embeds):
        raise InputError("the model's embeddings are not finite: the checkpoint cannot be used")
