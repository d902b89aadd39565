"""Layouts of arrays in PyTorch checkpoints and here, each with its inverse; access to nested dicts by path."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Sizes = Mapping[str, int]  # of a tower: K heads, h head size, p patch size, ...


class Layout(NamedTuple):
    """Functions of (array, sizes of the tower) between a checkpoint's layout and ours; they copy only if they must."""

    ours: Callable[[np.ndarray, Sizes], np.ndarray]
    theirs: Callable[[np.ndarray, Sizes], np.ndarray]


# fmt: off
SAME = Layout(lambda a, s: a, lambda a, s: a)
BATCHED = Layout(lambda a, s: a[0], lambda a, s: a[None])  # [1, N, E] <-> [N, E]
TOKEN = Layout(lambda a, s: a[0, 0], lambda a, s: a[None, None])  # [1, 1, E] <-> [E]
LINEAR = Layout(lambda a, s: a.T, lambda a, s: a.T)  # [out, in] <-> [in, out]
HEADS_IN = Layout(  # [E, E] or [E], out first <-> [E, K, h] or [K, h]
    lambda a, s: a.T.reshape(*a.shape[1:], s["K"], s["h"]),
    lambda a, s: a.reshape(*a.shape[:-2], -1).T,
)
HEADS_OUT = Layout(  # [E, E] <-> [K, h, E]
    lambda a, s: a.T.reshape(s["K"], s["h"], -1),
    lambda a, s: a.reshape(-1, a.shape[-1]).T,
)
PATCHES = Layout(  # convolution [E, 3, p, p] <-> [p * p * 3, E], channels run fastest
    lambda a, s: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
    lambda a, s: a.reshape(s["p"], s["p"], 3, -1).transpose(3, 2, 0, 1),
)
# fmt: on


def get(tree: Any, path: str) -> Any:
    """The leaf at `a/b/c`, or None."""
    for key in path.split("/"):
        if key not in tree:
            return None
        tree = tree[key]
    return tree


def put(tree: dict, path: str, leaf: Any) -> None:
    """Sets the leaf at `a/b/c`; makes the dicts above it."""
    *folders, name = path.split("/")
    for key in folders:
        tree = tree.setdefault(key, {})
    tree[name] = leaf
