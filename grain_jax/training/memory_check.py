"""Compares what a training step needs (memory_need.py) with the memory there is. Where it is too little, one line
says what to set.

`check` finds by arithmetic what is certain, before data is made or anything compiled. `check_step` has the
figures of the compiler, before the first step. `training_advice` is for what an allocator refuses after that
(`errors.out_of_memory_in_a_line`).
"""

import contextlib
import dataclasses
import functools
import os
import socket
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from grain_jax import config as config_lib
from grain_jax.core import errors, named
from grain_jax.input_pipeline import derived
from grain_jax.training import forward, memory_need, sharding, train_step
from grain_jax.training.memory_need import Need

HOST_BATCHES = 2  # at least, while one is put together of its parts
ROOM = 0.9  # share of the memory that a suggestion may fill


class Limit(NamedTuple):
    """The memory that arrays may take."""

    bytes: int  # of one device
    sharing: int | None  # how many devices share `sharing * bytes`; None: each has its own
    host: int  # bytes of the memory of the machine that this process may take

    @property
    def together(self) -> int:
        """The number of devices that printed sums are of."""
        return self.sharing or 1


_GROWS = {
    "parameters, optimiser state and gradients": "which mesh.fsdp cuts over the devices",
    "activations": "which grow with batch_size / microbatches",
    "batches": "which grow with batch_size",
}


@functools.cache
def limit() -> Limit:
    """The memory for the devices of this process. On CPUs all processes must call it: those of a machine share it."""
    host = host_bytes()
    stats = jax.local_devices()[0].memory_stats() or {}
    if stats.get("bytes_limit"):
        return Limit(stats["bytes_limit"], None, host)
    if jax.process_count() > 1:
        name = np.uint32(zlib.crc32(socket.gethostname().encode()))
        host //= int((multihost_utils.process_allgather(name) == name).sum())
    count = jax.local_device_count()
    return Limit(host // count, count, host)


def host_bytes(root: epath.PathLike = "/") -> int:
    """Bytes of memory of this machine, or of the container that the process is in."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    root = epath.Path(root)
    names = ["sys/fs/cgroup/memory/memory.limit_in_bytes"]  # version 1
    with contextlib.suppress(OSError, StopIteration):  # version 2: each group above has its own
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
        parts = [part for part in own.split("/") if part]
        groups = ["/".join(["sys/fs/cgroup", *parts[:n]]) for n in range(len(parts) + 1)]
        names += [f"{group}/memory.max" for group in groups]
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found.append(int((root / name).read_text()))
    return min(found)


def check(
    config: config_lib.Config,
    mesh: Mesh,
    there: Limit,
    program: train_step.Program | None = None,
) -> None:
    """Checks by shapes alone, before the data set and the state are made.

    Counts the images of a batch, the input of each layer of the image tower (kept under any remat policy), and the
    state of the `program`.

    Raises:
      OutOfMemory: these do not fit.
    """
    image, images = config.model.image, _images(config, mesh)
    pixels = 3 * image.image_size**2  # bytes
    if config.input.sequence_lengths:
        pixels = 3 * image.patch_size**2 * max(config.input.every_length)
    own = config.batch_size // jax.process_count() * pixels  # of this process
    layers = 0
    if not config.frozen and not named.is_external(image.tower):
        tokens = forward.patches_seen(config)
        layers = tokens * image.width * image.depth * jnp.dtype(config.dtype).itemsize
    needs = images * pixels + images // config.microbatches * layers
    if program is not None:
        needs += sum(memory_need.state_bytes(program).values())
    if needs > there.bytes:
        _refuse(_line(config, mesh, memory_need.estimate(config, mesh), there))
    if own * HOST_BATCHES > there.host:
        most = ROOM * there.host / (2 * HOST_BATCHES * pixels) * jax.process_count()
        sizes = (n for n in _smaller_batches(config, mesh) if n <= most)
        hint = f"--config.batch_size={next(sizes, 'N')}, or more processes"
        _refuse(
            f"out of memory: the input pipeline makes batches of {gigabytes(own)} on this machine, which"
            f" has {gigabytes(there.host)}. Set {hint}."
        )


def check_step(
    config: config_lib.Config,
    mesh: Mesh,
    program: train_step.Program,
    compiled: jax.stages.Compiled,
    there: Limit,
) -> str | None:
    """Checks the compiled step.

    Returns:
      A warning where the step fits and the batches that wait for it may not, or None.

    Raises:
      OutOfMemory: the step does not fit.
    """
    found = compiled.memory_analysis()
    if found is None:
        return None
    arguments = found.argument_size_in_bytes + found.generated_code_size_in_bytes
    written = found.output_size_in_bytes - found.alias_size_in_bytes
    step = arguments + written + found.temp_size_in_bytes
    images = _images(config, mesh)
    trained = memory_need.trained_bytes(program, config.frozen) * min(config.microbatches, 2)
    activations = max(found.temp_size_in_bytes - trained, 0) / (images // config.microbatches)
    need = memory_need.need_of(config, program, mesh, activations)
    if step > there.bytes:
        _refuse(_line(config, mesh, need, there, step=step))
    most = max(need.total(images, config.microbatches), step)
    if most > there.bytes:
        return _line(config, mesh, need, there, step=most, start="memory may run out: the step")
    return None


def training_advice(config: config_lib.Config) -> str:
    """What to set where a step ran out of memory although the arithmetic says that it fits."""
    mesh = sharding.make_mesh(config.mesh)
    need, there = memory_need.estimate(config, mesh), limit()
    needs = need.total(_images(config, mesh), config.microbatches)
    return _what_to_set(config, mesh, need, there, ROOM * min(there.bytes, needs / 2))


def _images(config: config_lib.Config, mesh: Mesh) -> int:
    """Images of a batch on one device."""
    return config.batch_size // sharding.batch_shards(mesh)


def _refuse(message: str) -> None:
    """Raises OutOfMemory; of several processes, which all find the same, the first has the message."""
    if jax.process_index():
        message = "out of memory: the first process says what to set"
    raise errors.OutOfMemory(message)


def _line(config, mesh, need, there, step=None, start="out of memory: the step") -> str:
    """The message: what is needed (`step` bytes, or by `need`), what there is, and `_what_to_set`."""
    needs = step or need.total(_images(config, mesh), config.microbatches)
    needs, has = (gigabytes(count * there.together) for count in (needs, there.bytes))
    owner = "this machine" if there.sharing else "a device"
    advised = _what_to_set(config, mesh, need, there, ROOM * there.bytes)
    return f"{start} needs about {needs}, {owner} has {has}; {advised}"


def _what_to_set(config, mesh, need, there, room) -> str:
    parts = need.parts(_images(config, mesh), config.microbatches)
    largest = max(parts, key=lambda name: parts[name])
    size = gigabytes(parts[largest] * there.together)
    advised = advice(config, mesh, need, room, there.together)
    return f"largest: {largest}, about {size}, {_GROWS[largest]}. {advised}"


def advice(config: config_lib.Config, mesh: Mesh, need: Need, room: float, sharing: int = 1) -> str:
    """A sentence with each value of batch_size, microbatches, remat and mesh.fsdp that alone makes the step fit.

    Args:
      config: of the run.
      mesh: of its devices.
      need: of the run.
      room: bytes of a device that may be used.
      sharing: number of devices that the printed sums are of.
    """
    images, parts = _images(config, mesh), config.microbatches
    found = []
    for size in _smaller_batches(config, mesh):
        needs = need.total(size // sharding.batch_shards(mesh), parts)
        if needs <= room:
            found.append(f"--config.batch_size={size} (about {gigabytes(needs * sharing)})")
            break
    doubled = (parts << n for n in range(1, max(images // parts, 1).bit_length()))
    for more in doubled:
        if need.total(images, more) <= room and _valid(config, mesh, microbatches=more):
            found.append(f"--config.microbatches={more}")
            break
    if config.remat != "full" and memory_need.recomputes(config, mesh):
        full = memory_need.estimate(dataclasses.replace(config, remat="full"), mesh)
        share = full.activations / memory_need.estimate(config, mesh).activations
        again = need._replace(activations=need.activations * share)
        if again.total(images, parts) <= room:
            found.append("--config.remat=full")
    found += _cut_over_devices(config, mesh, need, room)
    if not found:
        return (
            "No batch_size, microbatches, remat or mesh.fsdp alone is enough: set several of them, or take a"
            " smaller model or more devices."
        )
    return f"Set {', or '.join(found)}."


def _smaller_batches(config: config_lib.Config, mesh: Mesh) -> Iterator[int]:
    """Valid batch sizes below that of the config, the largest first: powers of two times the smallest."""
    least = sharding.least_batch(config, sharding.batch_shards(mesh))
    doublings = max(config.batch_size - 1, 1) // least
    for n in reversed(range(doublings.bit_length())):
        if _valid(config, mesh, batch_size=least << n):
            yield least << n


def _valid(config: config_lib.Config, mesh: Mesh, **changes: Any) -> bool:
    """Whether the config may have these fields on that mesh."""
    try:
        changed = config_lib.from_dict(dataclasses.asdict(dataclasses.replace(config, **changes)))
        sharding.check_batch(changed, mesh)
        train_step.check_groups(changed, mesh)
    except errors.UserError:
        return False
    return True


def _cut_over_devices(config, mesh, need, room) -> list[str]:
    """mesh.fsdp over more devices, where that is enough and nothing is cut yet."""
    fsdp = 2
    while config.mesh.fsdp == 1 and mesh.shape["data"] % fsdp == 0:
        cut = dataclasses.replace(config.mesh, data=-1, fsdp=fsdp)
        with contextlib.suppress(errors.UserError):  # a parameter that does not divide
            wide = sharding.make_mesh(cut, list(mesh.devices.flat))
            place = derived.Place(sharding.batch_shards(wide))
            changed, _ = derived.planned(dataclasses.replace(config, mesh=cut), place)
            program = train_step.build(changed, wide, total_steps=1, steps_per_epoch=1.0)
            less = memory_need.need_of(changed, program, wide, need.activations)
            if less.total(_images(config, mesh), config.microbatches) <= room:
                return [f"--config.mesh.fsdp={fsdp}"]
        fsdp *= 2
    return []


def gigabytes(count: float) -> str:
    """Bytes in words: "315.4 GB", "12 MB"."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
