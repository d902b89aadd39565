"""The ring of devices, round which blocks of rows or columns travel, each to every device.

Where a `Ring` gathers, g neighbours first share their blocks: g times the memory, 1/g
of the hops, each of g times the size. Along the links of a torus half of a block goes each way round, since a link
carries as much in both directions as in one. Of several slices, blocks go round each; then each chip sends one block to
the next slice, until all have been everywhere. What was found out about a block travels a hop behind it and at last to
the device that the block is of. All of this runs inside `jax.shard_map`.

Where products take three passes of bfloat16 (`loss.precision=high` on TPUs), which read 17 bits of a mantissa, the hops
carry vectors with 16, as three bytes a number.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


class Ring(NamedTuple):
    """Which mesh axes columns travel over; the default is one device."""

    axes: tuple[str, ...] = ()  # hop by hop
    size: int = 1  # devices along them
    gather: str | None = None  # the axis whose devices share their blocks before the first hop
    # Closed paths of positions along `axes` that follow links, one a slice, for hops both ways round (hops.py); (): one
    # path, 0, 1, 2, ..., one way.
    loops: tuple[tuple[int, ...], ...] = ()
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST  # of the products of float32

    @property
    def names(self) -> tuple[str, ...]:
        """All of its axes, as a collective such as `jax.lax.psum` takes them; () on one device."""
        return self.axes + ((self.gather,) if self.gather else ())


class TravellingBlock(NamedTuple):
    """Rows or columns that travel, in as few arrays as possible: each array is one transfer."""

    vectors: Float[Array, "k D"]
    labels: Int[Array, "n k"]


def stream(
    ring: Ring, block: TravellingBlock, update: Callable[[Any, TravellingBlock], Any], state: Any
) -> Any:
    """`state = update(state, block)` for the block of every device of the ring, this device's first."""
    visit = lambda state, block: (update(state, block), None)
    return stream_and_return(ring, block, visit, lambda *_: None, state, None)[0]


def stream_and_return(
    ring: Ring,
    block: TravellingBlock,
    visit: Callable[[Any, TravellingBlock], tuple[Any, Any]],
    join: Callable[[Any, Any], Any],
    state: Any,
    nothing: Any,
) -> tuple[Any, Any]:
    """`state, found = visit(state, block)` for each device's block, and what all devices found about this one's.

    Args:
      ring: the devices.
      block: that of this device, of k vectors.
      visit: what it finds is arrays [k, ...].
      join: two of the same block, found by different devices, to one.
      state: before the first visit, which is that of this device's block.
      nothing: [k, ...], found before the first visit.

    Returns:
      The state after the last visit. What was found, [k, ...]. Where the ring gathers, [g k, ...] of the g blocks, and
      of it what the devices with this one's place along `ring.gather` found: the g parts are still to be joined.
    """
    size = len(block.vectors)
    if ring.gather is not None:
        gather = functools.partial(jax.lax.all_gather, axis_name=ring.gather, tiled=True)
        block = TravellingBlock(gather(block.vectors), gather(block.labels, axis=1))
    if ring.size == 1:
        return visit(state, block)
    times = len(block.vectors) // size
    found = jax.tree.map(lambda x: jnp.concatenate([x] * times), nothing)
    loops = _loops(ring)
    slices, length = len(loops), len(loops[0])
    halves = ring.loops and length > 2 and len(block.vectors) > 1
    ways = (1, -1) if halves else (1,)  # forward and back along the path
    parts, found = _parts(block, ways), _parts(found, ways)
    packs = ring.precision == jax.lax.Precision.HIGH and block.vectors.dtype == jnp.float32
    pack, unpack = (packed, unpacked) if packs else (lambda x: x, lambda x: x)
    parts = [part._replace(vectors=pack(part.vectors)) for part in parts]

    def use(state, parts, found):
        # What was found of these parts before comes beside the tiles, a hop behind the parts.
        before = [_send(ring, part, 0, way) for part, way in zip(found, ways)]
        parts = [part._replace(vectors=unpack(part.vectors)) for part in parts]
        state, found = visit(state, _whole(parts))
        return state, [join(x, y) for x, y in zip(before, _parts(found, ways))]

    def turn(carry, _):
        state, parts, found = carry
        # Independent of the tiles, so that the next block travels while this one is used.
        coming = [_send(ring, part, 0, way) for part, way in zip(parts, ways)]
        state, found = use(state, parts, found)
        return (state, coming, found), None

    for remaining in reversed(range(slices)):
        carry = state, parts, found
        (state, parts, found), _ = jax.lax.scan(turn, carry, None, length=length - 1)
        coming = [_send(ring, part, 1, 0) for part in parts] if remaining else parts
        state, found = use(state, parts, found)
        if remaining:  # to the place from which the next hop takes it to its part
            parts = coming
            found = [_send(ring, part, 1, -way) for part, way in zip(found, ways)]
    # A part has gone once round each slice but for one hop, and once round the slices but for one.
    found = [_send(ring, part, 1, way * slices) for part, way in zip(found, ways)]
    return state, _whole(found)


def packed(x: Float[Array, "*n"]) -> UInt8[Array, "3 *n"]:
    """Float32 without the last byte of the mantissa, rounded to the nearest.

    The relative error of normal numbers is at most 2^-16. Infinity stays, so does the NaN of arithmetic.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + 0x80
    return jnp.stack([(bits >> shift).astype(jnp.uint8) for shift in (24, 16, 8)])


def unpacked(x: UInt8[Array, "3 *n"]) -> Float[Array, "*n"]:
    """The float32 numbers of `packed`."""
    high, middle, low = x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(high << 24 | middle << 16 | low << 8, jnp.float32)


def _loops(ring: Ring) -> tuple[tuple[int, ...], ...]:
    return ring.loops or (tuple(range(ring.size)),)


def _send(ring: Ring, part: Any, slices: int, places: int) -> Any:
    """Sends arrays to the device so many slices on, and so many places along the path through it."""
    loops = _loops(ring)
    hops = [
        (device, loops[(number + slices) % len(loops)][(place + places) % len(loop)])
        for number, loop in enumerate(loops)
        for place, device in enumerate(loop)
    ]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axes, hops), part)


def _axes(whole: Any) -> Any:
    """The axis of length k of each array of a block, or of what was found of it."""
    return (
        TravellingBlock._make((0, 1))
        if isinstance(whole, TravellingBlock)
        else jax.tree.map(lambda _: 0, whole)
    )


def _parts(whole: Any, ways: tuple[int, ...]) -> list:
    """A block, or what was found of it: whole, or a half for each way."""
    if len(ways) == 1:
        return [whole]

    def half(number):
        cut = lambda x, axis: jnp.split(x, [x.shape[axis] // 2], axis)[number]
        return jax.tree.map(cut, whole, _axes(whole))

    return [half(0), half(1)]


def _whole(parts: list) -> Any:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda axis, *xs: jnp.concatenate(xs, axis), _axes(parts[0]), *parts)
