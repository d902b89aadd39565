"""Digests that show damage: of JSON values, and of the bits of a state, equal on every mesh.

The digest of arrays is a sum of unsigned integers that wraps around, so that hosts can sum their parts in any
order. They find accidents, not forgeries.
"""

import json
import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from grain_jax.core import atomic


def of_json(value: Any) -> str:
    """The SHA-256 of a JSON value, independent of spaces and the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return atomic.digest(canonical.encode())


def of_state(state: Any) -> dict[str, str]:
    """The digest of the bits of each part of a TrainState that has arrays.

    The hosts compute it, since a save copies the arrays to them: each sums the shards that no other host has.
    A number at (i, j, ...) is multiplied by the odd 64-bit keys of i, j, ..., modulo 2**64.

    Args:
      state: a NamedTuple of placed arrays. Every process must call.

    Returns:
      Part, such as `params`, -> 16 hexadecimal digits.
    """
    sums = {}
    for part, tree in state._asdict().items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        shards = [
            _of_block(np.asarray(shard.data), jax.tree_util.keystr(path), leaf.shape, shard.index)
            for path, leaf in leaves
            for shard in leaf.addressable_shards
            if not shard.replica_id  # each is counted on one process only
        ]
        if leaves:
            sums[part] = sum(shards) % 2**64
    if jax.process_count() > 1:
        words = np.array([divmod(value, 2**32) for value in sums.values()], np.uint32)
        everywhere = multihost_utils.process_allgather(words).astype(np.uint64).sum(axis=0)
        totals = [((int(high) << 32) + int(low)) % 2**64 for high, low in everywhere]
        sums = dict(zip(sums, totals))
    return {part: f"{value:016x}" for part, value in sums.items()}


def of_arrays(tree: Any) -> str:
    """The digest of `of_state` for a part of these arrays, whole and on the host.

    Args:
      tree: nested dict of numpy arrays.

    Returns:
      16 hexadecimal digits.
    """
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        everything = (slice(None),) * leaf.ndim
        total += _of_block(np.asarray(leaf), jax.tree_util.keystr(path), leaf.shape, everything)
    return f"{total % 2**64:016x}"


def _of_block(values: np.ndarray, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> int:
    """The sum of `values`, the part at `index` of an array of that name and shape."""
    values = values.view(f"uint{8 * values.dtype.itemsize}")
    for axis in reversed(range(values.ndim)):
        stream = np.random.Philox(key=(zlib.crc32(name.encode()) << 8) + axis)
        keys = stream.random_raw(shape[axis]) | 1  # numpy never changes the raw stream of a bit generator
        values = np.einsum("...i,i->...", values, keys[index[axis]], dtype=np.uint64, casting="unsafe")
    return int(values)
