"""Where activations lie on the mesh, told by the trainer and asked for by the towers.

Left alone, XLA may follow the layout of fsdp's parameters and move activations between devices where it
should gather a layer's weights.
"""

import contextlib
import contextvars

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_mesh_and_axes: contextvars.ContextVar[tuple[Mesh, tuple[str, ...]] | None]
_mesh_and_axes = contextvars.ContextVar("mesh_and_axes", default=None)


@contextlib.contextmanager
def on(mesh: Mesh | None, batch_axes: tuple[str, ...]):
    """Inside, `by_batch` and `whole` bind arrays to the mesh; outside, or without a mesh, they do nothing."""
    token = _mesh_and_axes.set(None if mesh is None else (mesh, batch_axes))
    try:
        yield
    finally:
        _mesh_and_axes.reset(token)


def by_batch(x: jax.Array) -> jax.Array:
    """`x` with its leading axis cut like the batch."""
    return _bind(x, cut=True)


def whole(x: jax.Array) -> jax.Array:
    """`x` on every device, such as a table that is about to be looked up in."""
    return _bind(x, cut=False)


def _bind(x, *, cut):
    if _mesh_and_axes.get() is None:
        return x
    mesh, batch_axes = _mesh_and_axes.get()
    spec = PartitionSpec(batch_axes) if cut else PartitionSpec()
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
