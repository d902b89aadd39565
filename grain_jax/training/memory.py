"""What a training step needs in memory against what there is: running out of it is one line that says what to set.

`check` finds by arithmetic what is certain, before data is made or anything compiled; `check_step` has the
compiler's figures, before the first step; `training_advice` is for what an allocator refuses after that
(`errors.out_of_memory_in_a_line`).
"""

import contextlib
import dataclasses
import functools
import math
import os
import socket
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from grain_jax import config as config_lib
from grain_jax import errors, named
from grain_jax.input_pipeline import derived, device
from grain_jax.models.grain import GRAIN
from grain_jax.training import optim, sharding, train_step

FLOAT = 4  # bytes
# XLA's temporaries on CPUs against activations + layer of `temporaries` in float32, to which it takes bfloat16:
# 1.18 and 1.29 for the demo, 0.81 to 0.99 for S/16.
CPU_TEMPORARIES = 1.3
BATCHES = device.DEPTH + 2  # on the devices: in use, ahead, and about to be
HOST_BATCHES = 2  # at least, while one is put together of its parts
ROOM = 0.9  # share of the memory that a suggestion may fill


class Limit(NamedTuple):
    """What a device's arrays may take.

    Attributes:
      bytes: of one device.
      sharing: how many devices share one memory, of `sharing * bytes`; None where each has its own.
      host: bytes of the machine's memory that this process may take.
    """

    bytes: int
    sharing: int | None
    host: int


class Kept(NamedTuple):
    """An array that the forward pass leaves for the backward pass."""

    bytes: int
    shape: str  # "bfloat16[12,64,197,768]"
    where: str  # the module that makes it


class Need(NamedTuple):
    """What one device needs.

    Attributes:
      state: bytes of parameters, optimiser state and averages.
      gradients: bytes; there twice with micro-batches.
      activations: bytes of each image of a micro-batch.
      batch: bytes of each image of a batch.
    """

    state: float
    gradients: float
    activations: float
    batch: float

    def parts(self, images: int, microbatches: int) -> dict[str, float]:
        """Bytes of each kind, for so many images a device; their sum is what the device needs."""
        return {
            "parameters, optimiser state and gradients": self.state
            + self.gradients * min(microbatches, 2),
            "activations": self.activations * images / microbatches,
            "batches": self.batch * images * BATCHES,
        }

    def total(self, images: int, microbatches: int) -> float:
        return sum(self.parts(images, microbatches).values())


_GROWS = {
    "parameters, optimiser state and gradients": "which mesh.fsdp cuts over the devices",
    "activations": "which grow with batch_size / microbatches",
    "batches": "which grow with batch_size",
}


def kept(config: config_lib.Config, images: int) -> list[Kept]:
    """What the towers' forward pass keeps for the backward pass, the largest first.

    Args:
      config: model, dtype, remat policy and the layout of texts.
      images: of one device and one micro-batch, a multiple of the packing group.

    Returns:
      The arrays; parameters and inputs, which are there anyway, are left out.
    """
    config = dataclasses.replace(config, batch_size=images)
    model = GRAIN(config.model, config.dtype, config.remat)
    batch = train_step.abstract_batch(config)
    keys = jax.eval_shape(lambda: train_step.dropout_keys(0, 0, jnp.arange(images)))
    one = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), batch)
    params = jax.eval_shape(lambda: sharding.unbox(model.init(jax.random.key(0), one)["params"]))

    def apply(params, batch, keys):
        params = optim.stop_frozen(params, config.optim.frozen)
        return model.apply({"params": params}, batch, keys)

    def residuals(params, batch, keys):
        _, pull_back = jax.vjp(lambda p: apply(p, batch, keys), params)
        return jax.tree.leaves(pull_back)

    jaxpr = jax.make_jaxpr(residuals)(params, batch, keys).jaxpr
    # Inputs and constants are not made by an equation.
    makers = {id(v): equation for equation in jaxpr.eqns for v in equation.outvars}
    found = {id(v): v.aval for v in jaxpr.outvars if id(v) in makers}
    return sorted(
        (
            Kept(
                aval.size * aval.dtype.itemsize,
                f"{aval.dtype}[{','.join(map(str, aval.shape))}]",
                _module(str(makers[key].source_info.name_stack)),
            )
            for key, aval in found.items()
        ),
        reverse=True,
    )


def _module(name_stack: str) -> str:
    """The module below the model, such as image/norm, of "jvp(GRAIN)/GRAIN.encode_image/image/norm"."""
    return "/".join(part for part in name_stack.split("/") if "GRAIN" not in part)


def state_bytes(program: train_step.Program) -> dict[str, int]:
    """Bytes a device of a program's arguments by kind, before any padding."""
    state, shardings = program.state, program.shardings
    batch = jax.tree.leaves(program.batch)
    return {
        "parameters": _total(state.params, shardings.params),
        "moments": _total(state.opt_state, shardings.opt_state),
        "ema": _total(state.ema_params, shardings.ema_params),
        "batch": _total(batch, [program.batch_sharding] * len(batch)),
    }


def trained_bytes(program: train_step.Program, frozen: Sequence[str]) -> int:
    """Bytes a device of the parameters that have a gradient."""
    params, shardings = program.state.params, program.shardings.params
    stays = jax.tree.leaves(optim.frozen_mask(params, frozen))
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(shardings))
    trained = [pair for pair, fixed in zip(pairs, stays) if not fixed]
    return _total([x for x, _ in trained], [s for _, s in trained])


def _total(shapes: Any, shardings: Any) -> int:
    return sum(
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings))
    )


def temporaries(
    config: config_lib.Config, program: train_step.Program, shards: int
) -> dict[str, int]:
    """Bytes a device of what a step makes and drops, by arithmetic: trust it to a fifth on accelerators.

    Args:
      config: the run's.
      program: built of it.
      shards: parts that the batch is cut into.

    Returns:
      gradients, activations (kept by the remat policy), layer (one layer at work), losses.
    """
    images = config.batch_size // shards
    part = images // config.microbatches
    nothing_again = dataclasses.replace(
        config, remat="none", optim=dataclasses.replace(config.optim, frozen=())
    )
    # Three tiles (logits, their softmax, the mask), and blocks that are there, come and collect.
    vectors = images * config.loss.gather * (2 + config.input.max_regions)
    tile = min(config.loss.tile, images * max(config.input.max_regions, 1))
    activations = everything = sum(k.bytes for k in kept(config, part))
    if nothing_again != config:
        everything = sum(k.bytes for k in kept(nothing_again, part))
    return {
        "gradients": trained_bytes(program, config.optim.frozen) * min(config.microbatches, 2),
        "activations": activations,
        "layer": everything // config.model.image.depth,
        "losses": FLOAT * (3 * tile**2 + 3 * vectors * config.model.embed_dim),
    }


@functools.cache
def limit() -> Limit:
    """What this process's devices may take. On CPUs all processes call it: those of one machine share it."""
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
    """The memory of this machine, or of the container that the process is in."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    root = epath.Path(root)
    names = ["sys/fs/cgroup/memory/memory.limit_in_bytes"]  # version 1
    with contextlib.suppress(OSError, StopIteration):  # version 2: each group above has its own
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
        parts = [part for part in own.split("/") if part]
        names += [
            "/".join(["sys/fs/cgroup", *parts[:n], "memory.max"]) for n in range(len(parts) + 1)
        ]
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found.append(int((root / name).read_text()))
    return min(found)


def estimate(config: config_lib.Config, mesh: Mesh) -> Need:
    """What a device needs, by arithmetic. Raises ShardingError where the config does not fit the mesh."""
    config, _ = derived.planned(config, derived.Place(sharding.batch_shards(mesh)))
    program = train_step.build(config, mesh, total_steps=1, steps_per_epoch=1.0)
    factor = 1.0
    if _on_cpu(mesh):
        factor = CPU_TEMPORARIES
        remat = config.remat if _recomputes(config, mesh) else "none"
        config = dataclasses.replace(config, dtype="float32", remat=remat)
    made = temporaries(config, program, sharding.batch_shards(mesh))
    images = config.batch_size // sharding.batch_shards(mesh)
    part = images // config.microbatches
    activations = factor * (made["activations"] + made["layer"]) / part + made["losses"] / images
    return _need(config, program, mesh, activations)


def _on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _recomputes(config: config_lib.Config, mesh: Mesh) -> bool:
    """Whether `remat` saves memory: XLA's CPU backend undoes it where layers are unrolled."""
    image = config.model.image
    return not _on_cpu(mesh) or image.unroll < image.depth


def _need(config, program, mesh, activations: float) -> Need:
    sizes = state_bytes(program)
    batch = sizes.pop("batch") * sharding.batch_shards(mesh) / config.batch_size
    trained = trained_bytes(program, config.optim.frozen)
    return Need(sum(sizes.values()), trained, activations, batch)


def check(
    config: config_lib.Config,
    mesh: Mesh,
    there: Limit,
    program: train_step.Program | None = None,
) -> None:
    """Raises OutOfMemory where it is certain, from shapes alone: before the data set and the state are made.

    Counted are the images of a batch, what each layer of the image tower keeps under any remat policy (its
    input), and of a `program` the state.
    """
    image, shards = config.model.image, sharding.batch_shards(mesh)
    images = config.batch_size // shards
    pixels = 3 * image.image_size**2  # bytes
    own = config.batch_size // jax.process_count() * pixels  # of this process
    layers = 0
    if not config.optim.frozen and not named.is_external(image.tower):
        tokens = (image.image_size // image.patch_size) ** 2
        layers = tokens * image.width * image.depth * jnp.dtype(config.dtype).itemsize
    needs = images * pixels + images // config.microbatches * layers
    if program is not None:
        needs += sum(state_bytes(program).values())
    if needs > there.bytes:
        _refuse(_line(config, mesh, estimate(config, mesh), there))
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
    """Raises OutOfMemory where the compiled step needs more than there is.

    Returns:
      A warning where the step fits and the batches that wait for it may not, or None.
    """
    found = compiled.memory_analysis()
    if found is None:
        return None
    arguments = found.argument_size_in_bytes + found.generated_code_size_in_bytes
    written = found.output_size_in_bytes - found.alias_size_in_bytes
    step = arguments + written + found.temp_size_in_bytes
    need = _measured(config, mesh, program, found.temp_size_in_bytes)
    if step > there.bytes:
        _refuse(_line(config, mesh, need, there, step=step))
    images = config.batch_size // sharding.batch_shards(mesh)
    most = max(need.total(images, config.microbatches), step)
    if most > there.bytes:
        return _line(config, mesh, need, there, step=most, start="memory may run out: the step")
    return None


def _measured(config, mesh, program, made: int) -> Need:
    """The need, of the temporaries' bytes that the compiler says."""
    trained = trained_bytes(program, config.optim.frozen) * min(config.microbatches, 2)
    part = config.batch_size // sharding.batch_shards(mesh) // config.microbatches
    return _need(config, program, mesh, max(made - trained, 0) / part)


def _refuse(message: str) -> None:
    """Raises OutOfMemory; of several processes, which all find the same, the first says it."""
    if jax.process_index():
        message = "out of memory: the first process says what to set"
    raise errors.OutOfMemory(message)


def _line(
    config: config_lib.Config,
    mesh: Mesh,
    need: Need,
    there: Limit,
    step: float | None = None,
    start: str = "out of memory: the step",
) -> str:
    """What is needed and what there is, what is largest, and what to set."""
    images = config.batch_size // sharding.batch_shards(mesh)
    parts = need.parts(images, config.microbatches)
    largest = max(parts, key=parts.get)
    times = there.sharing or 1
    owner = "this machine" if there.sharing else "a device"
    needs = gigabytes((step or sum(parts.values())) * times)
    return (
        f"{start} needs about {needs}, {owner} has {gigabytes(there.bytes * times)}; largest: {largest},"
        f" {gigabytes(parts[largest] * times)}, {_GROWS[largest]}."
        f" {advice(config, mesh, need, ROOM * there.bytes, times)}"
    )


def advice(config: config_lib.Config, mesh: Mesh, need: Need, room: float, sharing: int = 1) -> str:
    """A sentence: each of batch_size, microbatches, remat and mesh.fsdp that would fit alone.

    Args:
      config: the run's.
      mesh: of its devices.
      need: of the run.
      room: bytes that a device may be filled with.
      sharing: devices whose sum is told.
    """
    shards = sharding.batch_shards(mesh)
    images, parts = config.batch_size // shards, config.microbatches
    found = []
    for size in _smaller_batches(config, mesh):
        needs = need.total(size // shards, parts)
        if needs <= room:
            found.append(f"--config.batch_size={size} (about {gigabytes(needs * sharing)})")
            break
    more = parts * 2
    while more <= images:
        if need.total(images, more) <= room and _valid(config, mesh, microbatches=more):
            found.append(f"--config.microbatches={more}")
            break
        more *= 2
    if config.remat != "full" and _recomputes(config, mesh):
        full = dataclasses.replace(config, remat="full")
        share = estimate(full, mesh).activations / estimate(config, mesh).activations
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
    """Batch sizes below the config's that it could have, the largest first: powers of two times the least."""
    group = (config.text.pack_group or 1) if config.text.packing else 1
    least = math.lcm(
        sharding.batch_shards(mesh) * config.microbatches * group,
        (config.input.lanes or 1) * group,
        config.loss.group_size or 1,
    )
    doublings = max(config.batch_size - 1, 1) // least
    for n in reversed(range(doublings.bit_length())):
        if _valid(config, mesh, batch_size=least << n):
            yield least << n


def _valid(config: config_lib.Config, mesh: Mesh, **changes: Any) -> bool:
    """Whether the config may have these fields on that mesh."""
    try:
        changed = config_lib.from_dict(dataclasses.asdict(dataclasses.replace(config, **changes)))
        sharding.check_batch(changed, mesh)
    except errors.UserError:
        return False
    return True


def _cut_over_devices(config, mesh, need, room) -> list[str]:
    """mesh.fsdp over more devices, where that is enough and nothing is cut yet."""
    if config.mesh.fsdp > 1:
        return []
    images = config.batch_size // sharding.batch_shards(mesh)
    fsdp = 2
    while mesh.shape["data"] % fsdp == 0:
        cut = dataclasses.replace(config.mesh, data=-1, fsdp=fsdp)
        with contextlib.suppress(errors.UserError):  # a parameter that does not divide
            changed = dataclasses.replace(config, mesh=cut)
            wide = sharding.make_mesh(cut, list(mesh.devices.flat))
            changed, _ = derived.planned(changed, derived.Place(sharding.batch_shards(wide)))
            program = train_step.build(changed, wide, total_steps=1, steps_per_epoch=1.0)
            less = _need(changed, program, wide, need.activations)
            if less.total(images, config.microbatches) <= room:
                return [f"--config.mesh.fsdp={fsdp}"]
        fsdp *= 2
    return []


def training_advice(config: config_lib.Config) -> str:
    """What to set where a step ran out of memory, whatever the arithmetic says there would be."""
    mesh = sharding.make_mesh(config.mesh)
    need, there = estimate(config, mesh), limit()
    images = config.batch_size // sharding.batch_shards(mesh)
    parts = need.parts(images, config.microbatches)
    largest = max(parts, key=parts.get)
    room = ROOM * min(there.bytes, sum(parts.values()) / 2)
    times = there.sharing or 1
    return (
        f"largest: {largest}, about {gigabytes(parts[largest] * times)}, {_GROWS[largest]}."
        f" {advice(config, mesh, need, room, times)}"
    )


def gigabytes(count: float) -> str:
    """Bytes in words: "315.4 GB", "12 MB"."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
