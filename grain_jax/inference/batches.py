"""Images and rows through the programs of a model, in batches of few sizes: few programs are compiled."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax.core import progress as progress_lib
from grain_jax.inference import inputs, jitted
from grain_jax.inference.inputs import InputError, Normalized, OneOrMany, Tokens
from grain_jax.runtime import processes

Item = TypeVar("Item")
MAX_BATCH = 64  # images or texts per device and batch
FEW = 8  # rows of the programs of small batches; images also go one by one
_COMPILING = "usually under a minute, on few CPU cores a few; once for each kind of call"


class BatchRunner:
    """Runs programs of (params, *rows), on `devices` if they are many; [None]: where the parameters are."""

    def __init__(self, params: Any, devices: Sequence[Any], image_size: int, progress: bool):
        self.params, self.devices = params, devices
        self._image_size, self._progress = image_size, progress

    @property
    def most_images(self) -> int:
        """The most images that are in memory at a time."""
        return MAX_BATCH * len(self.devices)

    def over_images(self, program: Callable[..., Any], images: OneOrMany) -> Any:
        """The results of `program` on all images, as numpy."""
        parts = [self.run(program, batch) for batch in self.batches(images)]
        if not parts:  # no image: the shapes alone
            image = jax.ShapeDtypeStruct((1, self._image_size, self._image_size, 3), np.uint8)
            if isinstance(images, Tokens):
                image = jax.ShapeDtypeStruct((1, *images.values.shape[1:]), images.values.dtype)
            shapes = jax.eval_shape(program, self.params, image)
            parts = [jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), shapes)]
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def batches(self, images: Any) -> Iterator[np.ndarray]:
        """Images, checked, or tokens, at most `most_images` at a time. Raises InputError."""
        most = self.most_images
        images = inputs.checked_images(images, self._image_size)
        if isinstance(images, (Tokens, Normalized)):
            for first in range(0, len(images[0]), most):
                yield images[0][first : first + most]
            return
        total = len(images) if hasattr(images, "__len__") else None
        counter = progress_lib.Counter("images", total, silent=not self._progress)
        resized = (inputs.resize(i, x, self._image_size) for i, x in enumerate(images))
        while batch := list(itertools.islice(resized, most)):
            yield np.stack(batch)
            counter.add(len(batch))
        counter.close(stays=True)

    def run(self, program: Callable[..., Any], *rows: np.ndarray, kinds=(MAX_BATCH, FEW, 1)) -> Any:
        """The results of `program` on `rows`, arrays of equal length, as numpy.

        Programs have `kinds` of rows per device. Up to MAX_BATCH rows run on one device, more on all.
        """
        count, params, sharding, devices = len(rows[0]), self.params, None, 1
        if count > MAX_BATCH:
            (params, sharding), devices = self._on_all_devices, len(self.devices)

        def call(*padded):
            return program(params, *(jax.device_put(padded, sharding) if sharding else padded))

        parts = _in_parts(call, rows, count, devices, kinds)
        return jax.tree.map(lambda *x: np.concatenate([*map(np.asarray, x)])[:count], *parts)

    @functools.cached_property
    def _on_all_devices(self) -> tuple[Any, NamedSharding]:
        """The parameters replicated on every device, and the sharding of a batch."""
        mesh = Mesh(self.devices, ("batch",))
        params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        return params, NamedSharding(mesh, PartitionSpec("batch"))


class MeshRunner(BatchRunner):
    """Runs programs with parameters that stay sharded over a mesh, of one process or of many in lockstep.

    Each process gives rows of its own, and all make the same calls in the same order. A call of `run` pads
    the rows to the largest number and shapes of all processes; `processes.rounds` keeps loops equally long.
    """

    def __init__(self, params: Any, mesh: Mesh, image_size: int, progress: bool):
        super().__init__(params, mesh.local_devices, image_size, progress)
        self._mesh = mesh

    @property
    def most_images(self) -> int:
        """No limit: each process makes one call of `run` where the others make one."""
        return sys.maxsize

    def run(self, program: Callable[..., Any], *rows: np.ndarray, kinds=(MAX_BATCH, FEW, 1)) -> Any:
        """As of `BatchRunner`: results of this process's rows."""
        largest = [np.max(x, axis=0) for x in zip(*processes.agree(None, [x.shape for x in rows]))]
        wide = [
            np.pad(x, [(0, 0), *((0, most - here) for here, most in zip(x.shape[1:], shape[1:]))])
            for x, shape in zip(rows, largest)
        ]
        sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))

        def call(*padded):
            placed = [jax.make_array_from_process_local_data(sharding, x) for x in padded]
            return jitted.on_mesh(program, self._mesh)(self.params, *placed)

        parts = _in_parts(call, wide, int(largest[0][0]), len(self.devices), kinds)
        return jax.tree.map(lambda *x: np.concatenate([*map(_rows_here, x)])[: len(rows[0])], *parts)


def _in_parts(
    call: Callable[..., Any], rows: Sequence[np.ndarray], count: int, devices: int, kinds: Sequence[int]
) -> list[Any]:
    """What `call` makes of `count` rows, in parts of few sizes; the last row is repeated to fill them."""
    results, first = [], 0
    for size in _sizes(-(-count // devices), kinds):
        places = np.minimum(np.arange(first, first + size * devices), len(rows[0]) - 1)
        with progress_lib.while_compiling(
            "the model for this machine", _COMPILING, silent=jax.process_index() > 0, once=True
        ):  # returns before it is computed
            results.append(call(*(x[places] for x in rows)))
        first += size * devices
    return results


def _rows_here(x: jax.Array) -> np.ndarray:
    """The rows of an array that lie on this process's devices, in their order."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def _sizes(count: int, kinds: Sequence[int]) -> list[int]:
    """The rows of the programs that take `count` rows, of descending `kinds`, each filled at least half."""
    sizes = []
    for kind in kinds:
        times, rest = divmod(count, kind)
        if rest > kind // 2 or (rest and kind == kinds[-1]):
            times, rest = times + 1, 0
        sizes += [kind] * times
        count = rest
    return sizes


def groups(items: Iterable[Item], size: int, counts: Callable[[Item], bool]) -> Iterator[list[Item]]:
    """Items in groups with `size` of those that count; the last group may have fewer."""
    group, number = [], 0
    for item in items:
        group.append(item)
        number += counts(item)
        if number == size:
            yield group
            group, number = [], 0
    if group:
        yield group


def check_finite(*embeds: np.ndarray) -> None:
    """Raises InputError where an embedding has numbers that are not finite."""
    if not all(np.isfinite(values).all() for values in embeds):
        raise InputError("the model's embeddings are not finite: the checkpoint cannot be used")
