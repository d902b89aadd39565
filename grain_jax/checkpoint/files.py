"""Reads the files of a checkpoint, each process by itself: one that fails leaves no other at a barrier."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from grain_jax.checkpoint import digests
from grain_jax.core import errors


class CheckpointError(errors.UserError):
    """There is no usable checkpoint where one was named; the message is one line."""


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, as Orbax needs it. A URL stays: pathlib would put the current folder before it."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.absolute()


def finished_steps(workdir: epath.PathLike) -> list[int]:
    """The steps of the finished checkpoints of a workdir, in order."""
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.is_dir():
        return []
    # Orbax renames a finished folder; an object store cannot, and this file says that all is there.
    renamed = "://" not in str(folder)
    return sorted(
        int(path.name)
        for path in folder.iterdir()
        if path.name.isdigit() and (renamed or (path / "commit_success.txt").exists())
    )


def read_json(folder: epath.PathLike, item: str) -> dict[str, Any]:
    """The item `config`, `digests` or `data` of the checkpoint `folder`."""
    with open_reader(ocp.JsonCheckpointHandler) as reader:
        return reader.restore(absolute(folder) / item)


class Items(NamedTuple):
    """What a checkpoint has beside its state."""

    digests: dict[str, Any]  # "config", "data" and "state" -> of each
    config: dict[str, Any]  # as it is stored
    data: list[dict[str, Any]]  # the identities of the record sets


def read_items(folder: epath.PathLike) -> Items:
    """The items of the checkpoint `folder`, compared with its digests.

    Raises:
      ValueError: an item is damaged; so does any error of a reader say.
    """
    stored, config, data = (read_json(folder, item) for item in ("digests", "config", "data"))
    found = {"config": digests.of_json(config), "data": digests.of_json(data)}
    if wrong := [item for item in found if stored[item] != found[item]]:
        raise ValueError(f"it was read, but is not what was saved: {', '.join(wrong)}")
    return Items(stored, config, data["sets"])


def read_data(folder: epath.PathLike) -> list[dict[str, Any]]:
    """The identities of the record sets in the checkpoint `folder`."""
    return read_json(folder, "data")["sets"]


def open_reader(handler: Callable[..., ocp.CheckpointHandler]) -> ocp.Checkpointer:
    """A reader that waits for no other process."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    return ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone)


def metadata_of(folder: epath.Path) -> Any:
    """Shapes and types of the arrays in `folder`, as Orbax stored them."""
    # Orbax warns that an item has no metadata of its own; they lie beside the items.
    logging.getLogger("absl").setLevel(logging.ERROR)
    with open_reader(ocp.PyTreeCheckpointHandler) as reader:
        metadata = reader.metadata(folder)
    metadata = getattr(metadata, "item_metadata", metadata)
    return getattr(metadata, "tree", metadata)


def read_arrays(folder: epath.Path, only: str | None = None) -> Any:
    """The tree of arrays in `folder`, or its part `only`, as numpy arrays, however it was sharded."""
    tree = metadata_of(folder)
    if only is not None:
        tree = {only: tree[only]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with open_reader(ocp.PyTreeCheckpointHandler) as reader:
        return reader.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=tree, restore_args=as_numpy, partial_restore=only is not None
            ),
        )


def attempt(
    read: Callable[[], Any], folder: epath.Path, passes: type[BaseException]
) -> tuple[Any, str | None]:
    """(what `read` finds in the folder, None), or (None, the fault). Raises errors of the type `passes`."""
    fault = None
    for _ in range(2 if "://" in str(folder) else 1):  # a network may have been down for a moment
        try:
            return read(), None
        except passes:
            raise
        except Exception as error:  # damaged bytes make a reader fail in any way
            fault = fault_of(error)
    return None, fault


def fault_of(error: BaseException) -> str:
    """In a line, what makes a checkpoint unreadable: whatever a reader makes of bytes that nobody wrote."""
    _silence_half_read()
    while error.__cause__ is not None:  # Orbax wraps what TensorStore says
        error = error.__cause__
    name = "" if isinstance(error, errors.UserError) else f"{type(error).__name__}: "
    return f"{name}{' '.join(str(error).split())[:200]}"


@functools.cache  # once is enough
def _silence_half_read() -> None:
    """Drops the messages of reads that Orbax abandons once one array cannot be read: they are pages long."""
    before = sys.unraisablehook

    def hook(unraisable):
        reader = getattr(unraisable.object, "__name__", "") == "_read_array_index_and_device_put"
        if not reader and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
