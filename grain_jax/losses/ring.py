"""The ring of devices: each device's block of rows or columns visits every device.

On a TPU half of a block goes each way round. With `gather` g neighbours share their blocks first: g times the
memory and 1/g of the hops, each of g times the size.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Ring(NamedTuple):
    """The mesh axes that blocks travel over; the default is one device."""

    axes: tuple[str, ...] = ()  # hop by hop
    size: int = 1  # devices along them
    gather: str | None = None  # the axis whose devices share their blocks before the first hop
    path: tuple[int, ...] = ()  # positions in the order of the hops (hops.py); (): 0, 1, 2, ...
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
    initial_result: Array | None,
) -> tuple[Any, Array | None]:
    """`state, result = visit(state, block)` for each device's block, and the results of all for this block.

    The results for a block travel one hop behind it, and at last to the device that the block came from.

    Args:
      ring: the devices.
      block: k vectors of this device.
      visit: its result is an array [k, ...], or None if nothing is to return.
      join: two results for the same block to one.
      state: before the first visit, which is to this device's own block.
      initial_result: [k, ...], the result before the first visit, or None.
    """
    if ring.gather is not None:
        block = jax.tree.map(lambda x: jax.lax.all_gather(x, ring.gather, tiled=True), block)
    if ring.size == 1:
        state, result = visit(state, block)
        return state, _of_own_block(ring, result, initial_result, join)

    def hop(carry, _):
        state, parts, results = carry
        coming = _sent(ring, parts)  # the next block travels while this one is used
        arrived = _sent(ring, results)
        state, new_result = visit(state, _whole(parts))
        return (state, coming, jax.tree.map(join, arrived, _split(ring, new_result))), None

    times = len(block.vectors) // (1 if initial_result is None else len(initial_result))
    result = jax.tree.map(lambda x: jnp.concatenate([x] * times), initial_result)
    carry = state, _split(ring, block), _split(ring, result)
    (state, parts, results), _ = jax.lax.scan(hop, carry, None, length=ring.size - 1)
    arrived = _sent(ring, results)
    state, new_result = visit(state, _whole(parts))
    results = jax.tree.map(join, arrived, _split(ring, new_result))
    return state, _of_own_block(ring, _whole(_sent(ring, results)), initial_result, join)


def _split(ring: Ring, tree: Any) -> list[Any]:
    """What goes along the path, and what goes back: a link carries as much in both directions as in one."""
    ways = 2 if ring.path else 1
    return [jax.tree.map(lambda x, n=n: jnp.array_split(x, ways)[n], tree) for n in range(ways)]


def _whole(parts: list[Any]) -> Any:
    """The inverse of `_split`."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def _sent(ring: Ring, parts: list[Any]) -> list[Any]:
    """The parts of the neighbours: of the device before this one on the path, and of the one after it."""
    path = ring.path or tuple(range(ring.size))
    along = list(zip(path, (*path[1:], path[0])))
    ways = along, [(receiver, sender) for sender, receiver in along]
    send = lambda part, way: jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axes, way), part)
    return [send(part, way) for part, way in zip(parts, ways)]


def _of_own_block(ring: Ring, result, initial_result, join):
    """The results for this device's block, from those for the blocks of all devices along `ring.gather`."""
    if ring.gather is None or initial_result is None:
        return result
    result = result.reshape(-1, *initial_result.shape)
    return functools.reduce(join, jax.lax.all_to_all(result, ring.gather, 0, 0))
