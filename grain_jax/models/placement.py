"""Where activations are placed on the mesh: the trainer sets the mesh, the models apply it.

Without these constraints XLA may follow the sharding of fsdp's parameters: it moves activations
between devices instead of gathering the weights of a layer.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_mesh_and_axes: contextvars.ContextVar[tuple[Mesh, tuple[str, ...]] | None]
_mesh_and_axes = contextvars.ContextVar("mesh_and_axes", default=None)


@contextlib.contextmanager
def on(mesh: Mesh | None, batch_axes: tuple[str, ...]) -> Iterator[None]:
    """Inside, `by_batch`, `whole` and `lookup` place arrays on the mesh; outside, or with None, nowhere."""
    token = _mesh_and_axes.set(None if mesh is None else (mesh, batch_axes))
    try:
        yield
    finally:
        _mesh_and_axes.reset(token)


def mesh() -> Mesh | None:
    """The mesh, or None."""
    current = _mesh_and_axes.get()
    return current and current[0]


def on_one_cpu() -> bool:
    """Whether the mesh is a single CPU device. Several stand for the devices of a pod, with its programs."""
    where = mesh()
    return where is not None and where.size == 1 and where.devices.flat[0].platform == "cpu"


def on_gpu() -> bool:
    """Whether the mesh has GPUs."""
    where = mesh()
    return where is not None and where.devices.flat[0].platform in ("gpu", "cuda", "rocm")


def batch_axes() -> tuple[str, ...]:
    """The axes of the mesh that cut the batch; none without a mesh."""
    current = _mesh_and_axes.get()
    return current[1] if current else ()


def on_each_device(function, mesh: Mesh | None, in_specs: tuple, out_specs):
    """`function` on the shard of each device of a mesh; the function itself without one."""
    if mesh is None:
        return function
    # Pallas stops the check: "`manual_axis_type` on `jax.ShapeDtypeStruct` must not be `None`".
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def by_batch(x: jax.Array) -> jax.Array:
    """`x` with its leading axis sharded like the batch, all other axes whole; on GPUs in row-major order.

    XLA for GPUs would put the batch innermost and transpose around each product. The order is fixed on each
    device, since XLA gathers an array whose order is fixed for all.
    """
    spec = PartitionSpec(batch_axes())
    x = _constrain(x, spec)
    if not on_gpu():
        return x
    rows = Layout(tuple(range(x.ndim)))
    return on_each_device(lambda x: with_layout_constraint(x, rows), mesh(), (spec,), spec)(x)


def added(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y `by_batch`; on GPUs not inside the product that makes y, for which XLA would copy x."""
    return by_batch(x + (jax.lax.optimization_barrier(y) if on_gpu() else y))


def whole(x: jax.Array) -> jax.Array:
    """`x` whole on every device, such as a table before a lookup."""
    return _constrain(x, PartitionSpec())


def lookup(table: jax.Array, ids: jax.Array, dtype: np.dtype) -> jax.Array:
    """Rows of a table, whole on every device: float32 [N, E], int32 [B, ...] -> float32 [B, ..., E].

    On a mesh B divides over the axes of the batch.

    On a device the gradient is summed in float32, since a frequent token sums over thousands of positions.
    Over the devices it is summed in `dtype`, like the gradients of the layers' products.
    """
    return _lookup(whole(table), ids, len(table), dtype, mesh(), batch_axes())


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _lookup(table, ids, rows, dtype, mesh, axes):
    return table[ids]


def _lookup_forward(table, ids, rows, dtype, mesh, axes):
    return table[ids], ids


def _lookup_backward(rows, dtype, mesh, axes, ids, d):
    def of_device(ids, d):
        return jnp.zeros((rows, d.shape[-1]), d.dtype).at[ids].add(d)

    def of_all(ids, d):
        return jax.lax.psum(of_device(ids, d).astype(dtype), axes).astype(d.dtype)

    batch = PartitionSpec(axes)
    run = of_device if mesh is None else of_all
    return on_each_device(run, mesh, (batch, batch), PartitionSpec())(ids, d), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    where = mesh()
    return x if where is None else jax.lax.with_sharding_constraint(x, NamedSharding(where, spec))
