"""The device mesh, and the sharding of batch, parameters and state by their logical axes."""

import math
from typing import Any

import flax.core.meta
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax import config as config_lib
from grain_jax import losses
from grain_jax.core import errors

BATCH_AXES = ("data", "fsdp")  # the leading axis of a batch is cut over both


class ShardingError(errors.UserError):
    """The mesh does not fit the devices, or a parameter does not fit the mesh; a line a fault."""


def mesh_sizes(config: config_lib.Mesh, count: int) -> dict[str, int]:
    """The sizes of the axes data, fsdp and tensor over `count` devices; -1 takes what the others leave.

    Raises:
      ShardingError: the axes do not multiply to the number of devices.
    """
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    rest = count // math.prod(n for n in sizes.values() if n != -1)
    sizes = {axis: rest if n == -1 else n for axis, n in sizes.items()}
    product = math.prod(sizes.values())
    if product != count:
        raise ShardingError(
            f"mesh: data x fsdp x tensor = {' x '.join(map(str, sizes.values()))} = {product},"
            f" expected {count} devices; set mesh.data=-1 to use the rest"
        )
    return sizes


def make_mesh(config: config_lib.Mesh, devices: list | None = None) -> Mesh:
    """The (data, fsdp, tensor) mesh over all devices; an axis of -1 takes what the others leave.

    Neighbours in the mesh are neighbours in the network. With `dcn_data` slices (or nodes), the data axis
    runs through the slices in turn: only its sums, and the texts of the losses, cross the slow network.

    Raises:
      ShardingError: the axes do not multiply to the number of devices, or the slices do not divide.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(mesh_sizes(config, len(devices)).values())
    slices, slices_there = config.dcn_data, len({getattr(d, "slice_index", 0) for d in devices})
    if slices % slices_there or sizes[0] % slices:
        raise ShardingError(
            f"mesh.dcn_data: got {slices}, expected a multiple of the {slices_there} slices that the devices"
            f" are on, and a divisor of mesh.data = {sizes[0]}"
        )
    in_order = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id))
    part = len(devices) // slices
    shape = (sizes[0] // slices, *sizes[1:])
    parts = [
        mesh_utils.create_device_mesh(shape, in_order[i : i + part], allow_split_physical_axes=True)
        for i in range(0, len(devices), part)
    ]
    return Mesh(np.concatenate(parts), ("data", "fsdp", "tensor"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array of a Batch: its leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(config: config_lib.Config, mesh: Mesh) -> None:
    """Checks that the batch divides: over the mesh, into micro-batches, packing groups and loss groups.

    Raises:
      ShardingError: it does not; a line for each fault, with flags that fit.
    """
    batch, parts = config.batch_size, batch_shards(mesh)
    faults = []
    if batch % parts:
        near = [n for n in (batch // parts * parts, -(-batch // parts) * parts) if n]
        faults.append(
            f"batch_size: got {batch}, expected a multiple of data x fsdp = {parts}; set"
            f" {config_lib.flags_of('batch_size', near, batch)}"
        )
    elif batch // parts % config.microbatches:
        choices = config_lib.divisors(batch // parts)
        faults.append(
            f"microbatches: got {config.microbatches}, expected a divisor of the {batch // parts} images"
            f" of a device; set {config_lib.flags_of('microbatches', choices, config.microbatches)}"
        )
    elif config.text.packing and config.text.pack_group:
        part = batch // (parts * config.microbatches)
        group, rows = config.text.pack_group, config.text.pack_rows
        if part % group:
            smaller = max(n for n in config_lib.divisors(part) if n < group)
            good = f"--config.text.pack_group={smaller}"
            if rows:  # one row more, since small groups leave more padding
                good += f" --config.text.pack_rows={-(-rows * smaller // group) + 1}"
            faults.append(
                f"text.pack_group: got {group}, expected a divisor of the {part} images of a device's"
                f" micro-batch, so that no group is cut; set {good}"
            )
    if not batch % parts:
        try:
            losses.make_layout(batch, config.loss, parts)
        except errors.UserError as error:
            faults.append(str(error))
    if faults:
        raise ShardingError("\n".join(faults))


def lanes_of_process(
    sharding: NamedSharding, *, batch_size: int, lanes: int, process_index: int
) -> tuple[int, ...]:
    """The lanes whose rows of the global batch lie on the devices of that process, in ascending order.

    The rows of a process need not be contiguous: the order of devices in a mesh follows the network. Two
    processes that hold the same rows (`tensor` across hosts) both serve them.

    Args:
      sharding: of the batch (`batch_sharding`).
      batch_size: rows; a multiple of `lanes`.
      lanes: lane i has the rows [i * batch_size / lanes, (i + 1) * batch_size / lanes).
      process_index: of the process.

    Raises:
      ShardingError: a lane lies partly on one process and partly on another.
    """
    per_lane = batch_size // lanes
    rows_of = _rows_of_processes(sharding, batch_size)
    for process, rows in sorted(rows_of.items()):
        of_lane = rows.reshape(lanes, per_lane).sum(axis=1)
        for lane in np.flatnonzero((of_lane > 0) & (of_lane < per_lane)):
            raise ShardingError(
                f"input.lanes: got {lanes}, but process {process} holds {of_lane[lane]} of the {per_lane}"
                f" images of lane {lane}; expected a multiple of {lanes_needed(sharding, batch_size)}, or"
                " another mesh"
            )
    return tuple(np.flatnonzero(rows_of[process_index].reshape(lanes, per_lane)[:, 0]).tolist())


def _rows_of_processes(sharding: NamedSharding, batch_size: int) -> dict[int, np.ndarray]:
    """Process -> bool [batch_size], the rows of the global batch that its devices hold."""
    parts = sharding.devices_indices_map((batch_size,)).items()
    rows_of = {device.process_index: np.zeros(batch_size, bool) for device, _ in parts}
    for device, (rows,) in parts:
        rows_of[device.process_index][rows] = True
    return rows_of


def lanes_needed(sharding: NamedSharding, batch_size: int) -> int:
    """The number that `input.lanes` must be a multiple of, so that each lane lies on one process."""
    rows_of = _rows_of_processes(sharding, batch_size).values()
    starts = [np.flatnonzero(np.diff(rows)) + 1 for rows in rows_of]
    return batch_size // math.gcd(batch_size, *np.concatenate(starts).tolist())


def table(abstract: Any, shardings: Any) -> str:
    """Name, shape, dtype, spec and bytes per device of every array of a state, and their sums, as text."""
    rows, per_device, everything = [("array", "shape", "dtype", "spec", "bytes per device")], 0, 0
    placed = zip(jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(shardings))
    for (path, x), sharding in placed:
        here = math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
        per_device += here
        everything += x.size * x.dtype.itemsize
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = ", ".join(map(str, sharding.spec))
        rows.append((name, "x".join(map(str, x.shape)), str(x.dtype), f"({spec})", f"{here:,}"))
    *widths, last = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1].rjust(last)])
        for row in rows
    ]
    share = per_device / max(everything, 1)
    lines.append(
        f"{per_device / 1e6:,.1f} MB per device, {share:.3f} of the {everything / 1e6:,.1f} MB of the state"
    )
    return "\n".join(lines)


def place_state(abstract: Any, rules: tuple[tuple[str, str | None], ...], mesh: Mesh) -> tuple[Any, Any]:
    """Shapes and shardings of a training state, or of parameters alone.

    Args:
      abstract: `jax.eval_shape` of the init; arrays are boxed with their logical axes, scalars need not be.
      rules: logical axis -> mesh axis (or None: not cut).
      mesh: the device mesh.

    Returns:
      (ShapeDtypeStructs, NamedShardings), trees without the boxes.

    Raises:
      ShardingError: no rule covers an axis, or an axis does not divide; a line for each parameter.
    """
    table = dict(rules)
    faults: list[str] = []

    def place_leaf(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not is_box(leaf):
            if leaf.ndim:
                faults.append(f"{name}: has no logical axes")
            return NamedSharding(mesh, PartitionSpec())
        before = len(faults)
        used = [table[axis] for axis in leaf.names if table.get(axis)]
        for size, axis in zip(leaf.value.shape, leaf.names):
            if axis is None:
                continue
            if axis not in table:
                faults.append(f"{name}: `sharding` has no rule for its axis {axis!r}")
            elif table[axis] and table[axis] not in mesh.shape:
                faults.append(
                    f"{name}: `sharding` sends its axis {axis!r} to {table[axis]!r}, expected one of"
                    f" {', '.join(mesh.shape)}"
                )
            elif table[axis] and used.count(table[axis]) > 1:
                faults.append(f"{name}: `sharding` sends two of its axes to {table[axis]!r}")
            elif table[axis] and size % mesh.shape[table[axis]]:
                faults.append(
                    f"{name}: its axis {axis!r} of {size} does not divide by"
                    f" mesh.{table[axis]} = {mesh.shape[table[axis]]}"
                )
        if len(faults) > before:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*(table.get(axis) for axis in leaf.names)))

    shardings = jax.tree_util.tree_map_with_path(place_leaf, abstract, is_leaf=is_box)
    if faults:
        raise ShardingError("\n".join(faults))
    return unbox(abstract), shardings


def is_box(leaf: Any) -> bool:
    """Whether it is a box that holds an array with its logical axes."""
    return isinstance(leaf, flax.core.meta.AxisMetadata)


def unbox(tree: Any) -> Any:
    """The tree without the boxes that hold the logical axes."""
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)
