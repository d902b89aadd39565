"""The ring of devices: each device's block of rows or columns visits every device.

On a TPU half of a block goes each way round, since a link carries as much in both directions as in one. With several
slices, blocks go round each slice; then each chip sends one block to the next slice, until all have been everywhere.
With `gather` g neighbours share their blocks first: g times the memory and 1/g of the hops, each of g times the size.

Products of three bfloat16 passes (`loss.precision=high` on TPUs) read 17 bits of a mantissa. There the hops carry
vectors with 16 bits, as three bytes per number.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


class Ring(NamedTuple):
    """The mesh axes that blocks travel over; the default is one device."""

    axes: tuple[str, ...] = ()  # hop by hop
    size: int = 1  # devices along them
    gather: str | None = None  # the axis whose devices share their blocks before the first hop
    loops: tuple[
        tuple[int, ...], ...
    ] = ()  # closed paths along links, one per slice (hops.py); (): 0, 1, 2, ...
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST  # of the products of float32

    @property
    def names(self) -> tuple[str, ...]:
        """All axes, as a collective such as `jax.lax.psum` takes them; () on one device."""
        return self.axes + ((self.gather,) if self.gather else ())


class Block(NamedTuple):
    """What travels, in as few arrays as possible: each array is one transfer."""

    vectors: Float[Array, "k D"]
    labels: Int[Array, "k n"]


def exchange(
    ring: Ring,
    block: Block,
    visit: Callable[[Any, Block], tuple[Any, Array | None]],
    join: Callable[[Array, Array], Array],
    state: Any,
    nothing: Array | None,
) -> tuple[Any, Array | None]:
    """`state, result = visit(state, block)` for each device's block, and the results of all devices for this block.

    The results for a block travel one hop behind it, and at last to the device that the block came from.

    Args:
      ring: the devices.
      block: k vectors of this device.
      visit: its result is an array [k, ...], or None if nothing is to return.
      join: two results for the same block to one.
      state: before the first visit, which is to this device's own block.
      nothing: [k, ...], the result before the first visit, or None.
    """
    if ring.gather is not None:
        block = jax.tree.map(lambda x: jax.lax.all_gather(x, ring.gather, tiled=True), block)
    if ring.size == 1:
        state, result = visit(state, block)
        return state, _of_own_block(ring, result, nothing, join)
    ways = (1, -1) if ring.loops and len(block.vectors) > 1 else (1,)  # along the path, and back
    cut = lambda tree, n: jax.tree.map(lambda x: jnp.array_split(x, len(ways))[n], tree)
    split = lambda tree: [cut(tree, n) for n in range(len(ways))]
    whole = lambda parts: jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    send = lambda parts, slices, places: [
        _send(ring, part, slices, way * places) for part, way in zip(parts, ways)
    ]
    packs = ring.precision == jax.lax.Precision.HIGH and block.vectors.dtype == jnp.float32
    pack, unpack = (packed, unpacked) if packs else (lambda x: x, lambda x: x)

    def use(state, parts, results):
        arrived = send(results, 0, 1)
        parts = [part._replace(vectors=unpack(part.vectors)) for part in parts]
        state, new_results = visit(state, whole(parts))
        return state, jax.tree.map(join, arrived, split(new_results))

    def turn(carry, _):
        state, parts, results = carry
        coming = send(parts, 0, 1)  # the next block travels while this one is used
        state, results = use(state, parts, results)
        return (state, coming, results), None

    parts = [part._replace(vectors=pack(part.vectors)) for part in split(block)]
    times = len(block.vectors) // (1 if nothing is None else len(nothing))
    results = split(jax.tree.map(lambda x: jnp.concatenate([x] * times), nothing))
    loops = ring.loops or (range(ring.size),)
    for remaining in reversed(range(len(loops))):
        carry = state, parts, results
        (state, parts, results), _ = jax.lax.scan(turn, carry, None, length=len(loops[0]) - 1)
        coming = send(parts, 1, 0) if remaining else parts
        state, results = use(state, parts, results)
        if remaining:  # to the place from which the next hop takes the results to their part
            parts, results = coming, send(results, 1, -1)
    # A part has gone once round each slice but for one hop, and once round the slices but for one.
    results = send(results, 1, len(loops))
    return state, _of_own_block(ring, whole(results), nothing, join)


def _of_own_block(ring: Ring, result, nothing, join):
    """The results for this device's block, from those for the blocks of all devices along `ring.gather`."""
    if ring.gather is None or nothing is None:
        return result
    result = result.reshape(-1, *nothing.shape)
    return functools.reduce(join, jax.lax.all_to_all(result, ring.gather, 0, 0))


def _send(ring: Ring, tree: Any, slices: int, steps: int) -> Any:
    """Sends arrays so many slices on, and so many places along the path through a slice."""
    loops = ring.loops or (range(ring.size),)
    hops = [
        (device, loops[(number + slices) % len(loops)][(position + steps) % len(loop)])
        for number, loop in enumerate(loops)
        for position, device in enumerate(loop)
    ]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axes, hops), tree)


def packed(x: Float[Array, "*n"]) -> UInt8[Array, "3 *n"]:
    """Float32 without the last byte of the mantissa, rounded to the nearest (relative error at most 2^-16)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + 0x80
    return jnp.stack([(bits >> shift).astype(jnp.uint8) for shift in (24, 16, 8)])


def unpacked(x: UInt8[Array, "3 *n"]) -> Float[Array, "*n"]:
    """The float32 numbers of `packed`."""
    high, middle, low = x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(high << 24 | middle << 16 | low << 8, jnp.float32)
