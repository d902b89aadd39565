"""Many images through a model: threads read the next ones while the device works."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np

from grain_jax.inference.inputs import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], pool: Executor, most: int
) -> Iterator[Result]:
    """`map(function, items)` by the threads of `pool`, in order, at most `most` items in advance."""
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


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
