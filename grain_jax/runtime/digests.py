"""Digests of the bits of batches and states, equal on every mesh and for any number of processes.

A digest is a sum of unsigned integers that wraps around. The term of an element mixes its bits with its position in
the whole array, so that devices and hosts can sum their parts in any order. It is not a cryptographic hash.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from grain_jax.core import schema

EXAMPLES, PIXELS = 0, 1  # rows of the chains


def scramble(x: jax.Array) -> jax.Array:
    """uint32 -> uint32, one to one, every bit matters (the finaliser of MurmurHash3, Appleby 2011)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def of_array(x: jax.Array, name: str) -> jax.Array:
    """The digest of an array of numbers of at most 32 bits.

    Args:
      x: any shape, at most 2**32 elements.
      name: equal arrays of other names have other digests.

    Returns:
      uint32 [2].
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.full(x.shape, zlib.crc32(name.encode()), jnp.uint32)
    for axis in range(x.ndim):
        stride = np.uint32(math.prod(x.shape[axis + 1 :]))
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
    hashes = scramble(bits ^ scramble(place))
    other = scramble(hashes ^ np.uint32(0x9E3779B9))
    return jnp.stack([hashes.sum(dtype=jnp.uint32), other.sum(dtype=jnp.uint32)])


def of_batch(batch: schema.Batch) -> jax.Array:
    """uint32 [2, 2]: the digests of everything but the images, and of the images.

    The images have a digest of their own because another CPU or another TensorFlow may round differently when
    they are decoded and resized.
    """
    # `text_counts` follows from the records and `caption_mask` from `caption_at`.
    examples = sum(
        of_array(value, name)
        for name, value in batch._asdict().items()
        if value is not None and name not in ("image", "text_counts", "caption_mask")
    )
    image = batch.image
    if isinstance(image, schema.Patches):
        examples += of_array(image.grid, "grid")
        image = image.pixels.reshape(*image.pixels.shape[:2], -1, 3)
    red, green, blue = jnp.moveaxis(image.astype(jnp.uint32), -1, 0)  # a word a pixel
    return jnp.stack([examples, of_array(red | green << 8 | blue << 16, "image")])


def extend(chains: jax.Array, digests: jax.Array, step: jax.Array) -> jax.Array:
    """The chains [2, 2] after the batch of `step`; each depends on all batches so far and on their order."""
    first = scramble(scramble(chains[:, 0] + step.astype(jnp.uint32)) ^ digests[:, 0])
    second = scramble(scramble(chains[:, 1] ^ first) + digests[:, 1])
    return jnp.stack([first, second], axis=1)


def text(words: Any) -> str:
    """A digest, or a chain, of two uint32 words as 16 hexadecimal digits."""
    first, second = np.asarray(words).tolist()
    return f"{first:08x}{second:08x}"


def chains(receipt: Any) -> dict[str, str]:
    """`TrainState.receipt` as metrics and records show it. Needs no other process."""
    words = np.asarray(receipt)
    return {"batch_chain": text(words[EXAMPLES]), "pixel_chain": text(words[PIXELS])}


def of_state(state: Any) -> dict[str, str]:
    """The digest of the bits of each part of a TrainState that is a tree of arrays.

    The hosts compute it, since a save copies the arrays to them: each sums the shards that no other host has. A
    number at (i, j, ...) is multiplied by the odd 64-bit keys of i, j, ..., modulo 2**64.

    Args:
      state: a NamedTuple of placed arrays. Every process must call.

    Returns:
      Part -> 16 hexadecimal digits: `params`, `opt_state` and, where there are any, `ema_params`, `teacher` and
      `term_state`.
    """
    sums, parts = {}, state._asdict()
    for part in ("params", "opt_state", "ema_params", "teacher", "term_state"):
        leaves = jax.tree_util.tree_leaves_with_path(parts.get(part))
        shards = [
            _of_block(np.asarray(shard.data), jax.tree_util.keystr(path), leaf.shape, shard.index)
            for path, leaf in leaves
            for shard in leaf.addressable_shards
            if not shard.replica_id  # each is counted on one process only
        ]
        if leaves:
            sums[part] = sum(shards) % 2**64
    words = np.array([divmod(value, 2**32) for value in sums.values()], np.uint32)
    if jax.process_count() > 1:
        everywhere = multihost_utils.process_allgather(words).astype(np.uint64)
        totals = [(int(high) << 32) + int(low) for high, low in everywhere.sum(axis=0)]
        words = np.array([divmod(total % 2**64, 2**32) for total in totals], np.uint32)
    return {part: text(pair) for part, pair in zip(sums, words)}


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
    return text(divmod(total % 2**64, 2**32))


def _of_block(
    values: np.ndarray, name: str, shape: tuple[int, ...], index: tuple[slice, ...]
) -> int:
    """The sum of `values`, the part at `index` of an array of that name and shape."""
    values = values.view(f"uint{8 * values.dtype.itemsize}")
    for axis in reversed(range(values.ndim)):
        keys = _keys(name, axis, shape[axis])[index[axis]]
        values = np.einsum("...i,i->...", values, keys, dtype=np.uint64, casting="unsafe")
    return int(values)


def _keys(name: str, axis: int, size: int) -> np.ndarray:
    """Odd numbers, uint64 [size]; numpy never changes the raw stream of a bit generator."""
    return np.random.Philox(key=(zlib.crc32(name.encode()) << 8) + axis).random_raw(size) | 1
