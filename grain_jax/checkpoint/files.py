"""Reads the files of a checkpoint, each process by itself: one that fails leaves no other at a barrier."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from grain_jax.checkpoint import digests
from grain_jax.core import errors


class CheckpointError(errors.UserError):
    """There is no usable checkpoint where one was named; the message is one line."""


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, as Orbax needs it. A URL stays: pathlib would change it."""
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


class Items(NamedTuple):
    """What a checkpoint has beside its state: the custom metadata of Orbax."""

    digests: dict[str, Any]  # "items", of the others of this tuple, and "state"
    config: dict[str, Any]  # the resolved config, as JSON
    data: list[dict[str, Any]]  # the identities of the record sets
    best: float | None  # the value of checkpoint_best_metric


def read_items(folder: epath.PathLike) -> Items:
    """The items of the checkpoint `folder`, compared with their digests.

    Raises:
      ValueError: an item is damaged. A reader may raise any other error.
    """
    with this_process():
        content: Any = ocp.metadata(absolute(folder)).custom_metadata
    items = Items(*(content[name] for name in Items._fields))
    if digests.of_json(items[1:]) != items.digests["items"]:
        raise ValueError("it was read, but is not what was saved: its config, data or best value")
    return items


def this_process(*, partial: bool = False) -> ocp.Context:
    """A context of Orbax in which a read waits for no other process.

    Args:
      partial: whether a read may name some arrays only.
    """
    context, process = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = process
    context.multiprocessing.active_processes = {process}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{process}"
    context.pytree.loading.partial_load = partial
    return context


def metadata_of(folder: epath.PathLike) -> Any:
    """Shapes and types of the arrays in a checkpoint, or in a folder of arrays alone."""
    with this_process():
        return ocp.metadata(absolute(folder)).metadata


def read_arrays(folder: epath.PathLike, only: str | None = None) -> Any:
    """The arrays in a checkpoint, or in a folder of arrays alone.

    Args:
      folder: what is read.
      only: the part of the tree that is read; None: all.

    Returns:
      Nested dict of numpy arrays, however they were sharded.
    """
    tree = metadata_of(folder)
    if only is not None:
        tree = {only: tree[only]}
    with this_process(partial=only is not None):
        return ocp.load(absolute(folder), jax.tree.map(lambda _: np.ndarray, tree))


def attempt(
    read: Callable[[], Any], folder: epath.Path, passes: type[BaseException] | tuple[()] = ()
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
    errors.silence_storage()
    while error.__cause__ is not None:  # Orbax wraps what TensorStore says
        error = error.__cause__
    name = "" if isinstance(error, errors.UserError) else f"{type(error).__name__}: "
    return f"{name}{' '.join(str(error).split())[:200]}"
