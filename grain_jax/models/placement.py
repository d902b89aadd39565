"""Where activations are placed on the mesh: the trainer sets the mesh, the models apply it.

Left alone, XLA may follow the sharding of fsdp's parameters and move activations between devices where it
should gather the weights of a layer.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_mesh_and_axes: contextvars.ContextVar[tuple[Mesh, tuple[str, ...]] | None]
_mesh_and_axes = contextvars.ContextVar("mesh_and_axes", default=None)


@contextlib.contextmanager
def on(mesh: Mesh | None, batch_axes: tuple[str, ...]) -> Iterator[None]:
    """Inside, `by_batch` and `whole` constrain arrays to the mesh; outside, or with mesh None, they do nothing."""
    token = _mesh_and_axes.set(None if mesh is None else (mesh, batch_axes))
    try:
        yield
    finally:
        _mesh_and_axes.reset(token)


def mesh() -> Mesh | None:
    """The mesh, or None."""
    found = _mesh_and_axes.get()
    return found and found[0]


def batch_axes() -> tuple[str, ...]:
    """The axes of the mesh that cut the batch; none without a mesh."""
    found = _mesh_and_axes.get()
    return found[1] if found else ()


def by_batch(x: jax.Array) -> jax.Array:
    """`x` with its leading axis sharded like the batch, all other axes whole."""
    return _constrain(x, PartitionSpec(batch_axes()))


def whole(x: jax.Array) -> jax.Array:
    """`x` whole on every device, such as a table before a lookup."""
    return _constrain(x, PartitionSpec())


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    where = mesh()
    return x if where is None else jax.lax.with_sharding_constraint(x, NamedSharding(where, spec))
