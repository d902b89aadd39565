"""Digests that show damage: of JSON values, and of the bits of a state, equal on every mesh.

The digest of arrays is two sums of unsigned integers that wrap around, so that devices can sum their parts in
any order. The digests find accidents, not forgeries.
"""

import json
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.core import atomic


def of_json(value: Any) -> str:
    """The SHA-256 of a JSON value, independent of spaces and the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return atomic.digest(canonical.encode())


def of_state(state: Any) -> dict[str, str]:
    """The digest of the bits of each part of a TrainState that has arrays.

    The devices sum each array where it is, and the host waits for two integers per array. A number at
    position i is multiplied by odd 32-bit hashes of i and of the array's name, modulo 2**32.

    Args:
      state: a NamedTuple of placed arrays. Every process must call.

    Returns:
      Part, such as `params`, -> 16 hexadecimal digits.
    """
    parts = {}
    for part, tree in state._asdict().items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        if leaves:
            parts[part] = [_sums_on_devices(_seed(path), x) for path, x in leaves]
    return {part: _hexadecimal(sums) for part, sums in jax.device_get(parts).items()}


def of_arrays(tree: Any) -> str:
    """The digest of `of_state` for a part of these arrays, on the host.

    Args:
      tree: nested dict of numpy arrays.

    Returns:
      16 hexadecimal digits.
    """
    sums = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(x)
        sums.append(_sums(_seed(path), array.view(f"uint{8 * array.dtype.itemsize}"), np))
    return _hexadecimal(sums)


@jax.jit
def _sums_on_devices(seed: jax.Array, x: jax.Array) -> jax.Array:
    return _sums(seed, jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}"), jnp)


def _sums(seed: Any, numbers: Any, numpy: Any) -> Any:
    """The two sums of an array of unsigned integers, uint32 [2]; `numpy` is NumPy or JAX's."""
    numbers = numpy.atleast_1d(numbers).astype(numpy.uint32)
    position, stride = numpy.zeros((1,) * numbers.ndim, numpy.uint32) + seed, 1
    for axis in reversed(range(numbers.ndim)):
        steps = numpy.arange(numbers.shape[axis], dtype=numpy.uint32) * numpy.uint32(stride % 2**32)
        position = position + steps.reshape(-1, *(1,) * (numbers.ndim - 1 - axis))
        stride *= numbers.shape[axis]
    first = _mixed(position, numpy)
    keys = first, _mixed(first + numpy.uint32(1), numpy)
    return numpy.stack([(numbers * (key | numpy.uint32(1))).sum(dtype=numpy.uint32) for key in keys])


def _mixed(x: Any, numpy: Any) -> Any:
    """A hash in which each bit depends on all: lowbias32 of nullprogram.com/blog/2018/07/31."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> numpy.uint32(shift))) * numpy.uint32(factor)
    return x ^ (x >> numpy.uint32(16))


def _seed(path: Any) -> np.ndarray:
    """A number for the name of an array, uint32 []."""
    return np.asarray(zlib.crc32(jax.tree_util.keystr(path).encode()), np.uint32)


def _hexadecimal(sums: Sequence[np.ndarray]) -> str:
    return "".join(f"{int(x) % 2**32:08x}" for x in np.asarray(sums).sum(axis=0))
