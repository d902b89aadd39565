"""Checkpoints on disk, by Orbax: a run's states under `WORKDIR/checkpoints/STEP`, or a model alone in a folder.

A run's checkpoint has the items `state` (the TrainState; its step is the only data state there is),
`config` (the resolved config), `receipt` (its record) and `data` (what tells its record sets from others). A converted model is a folder with `config.json` ({"model": ...}) and
`params/`. `load_model` reads either.
"""

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    EveryNSteps,
    LatestN,
    PreservationPolicy,
)

from grain_jax import config as config_lib
from grain_jax import errors
from grain_jax.runtime import digests, receipt


class CheckpointError(errors.UserError):
    """There is no usable checkpoint where one was named; the message is one line."""


_DIFFERENCES = 30  # lines that a message shows of them
_NEW_PARTS = (
    "text_counts",
)  # of a TrainState, that came later than the first checkpoints: 0 there


class Manager(ocp.CheckpointManager):
    """Orbax's, but for two answers."""

    def reached_preemption(self, step: int) -> bool:
        """Never: the trainer asks JAX, and two series of numbers would mislead it (preemption.py)."""
        del step
        return False

    def metrics(self, step: int) -> Any:
        """The metrics of that checkpoint, or None, also where they are damaged: the state may be whole."""
        try:
            return super().metrics(step)
        except ValueError:
            return None


def _absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root, as Orbax wants it; a URL is that, but pathlib would put this folder before it."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.absolute()


def finished_steps(workdir: epath.PathLike) -> list[int]:
    """The steps of the workdir's finished checkpoints, in order."""
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


def newest_config(workdir: epath.PathLike) -> tuple[config_lib.Config | None, str]:
    """The config of the newest checkpoint whose config can be read, and that checkpoint in words; or (None, "")."""
    folder = _absolute(workdir) / "checkpoints"
    for step in reversed(finished_steps(workdir)):
        try:
            return config_lib.from_dict(
                read_json(folder / str(step), "config")
            ), f"checkpoint {step}"
        except Exception:  # damaged; `restore_newest` says so, and takes the one before
            continue
    return None, ""


def manager(workdir: epath.PathLike, config: config_lib.Config) -> Manager:
    """The run's checkpoint manager: asynchronous; what a save that was cut off left behind is removed.

    It keeps the last `checkpoint_keep`, those of every `checkpoint_keep_every` steps, and the best by
    `checkpoint_best_metric`.
    """
    kept: list[PreservationPolicy] = [LatestN(config.checkpoint_keep)]
    if config.checkpoint_keep_every:
        kept.append(EveryNSteps(config.checkpoint_keep_every))
    best_fn = None
    if config.checkpoint_best_metric:
        best_fn = lambda metrics: metrics[config.checkpoint_best_metric]  # noqa: E731
        kept.append(
            BestN(
                get_metric_fn=best_fn,
                reverse=config.checkpoint_best_mode == "min",
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    return Manager(
        _absolute(workdir) / "checkpoints",
        options=ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept),
            best_fn=best_fn,  # so that the metric is stored
            best_mode=config.checkpoint_best_mode,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        ),
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
            "receipt": ocp.JsonCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
        },
    )


def save(
    checkpoints: Manager,
    state: Any,
    config: config_lib.Config,
    record: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    data: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Starts to write `state` under its own step; training goes on meanwhile.

    Args:
      checkpoints: of the run.
      state: the TrainState.
      config: the run's.
      record: of this save (receipt.py); the first process's is stored.
      metrics: those of this step, of which `checkpoint_best_metric` is stored; the same on all processes.
      data: the identities of the run's record sets (input_pipeline/records.py).
    """
    step, name = int(state.step), config.checkpoint_best_metric
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            config=ocp.args.JsonSave(dataclasses.asdict(config)),
            receipt=ocp.args.JsonSave(dict(record)),
            data=ocp.args.JsonSave({"sets": list(data)}),
        ),
        metrics={name: metrics[name]} if metrics and name in metrics else None,
    )


def restore_newest(
    checkpoints: Manager,
    config: config_lib.Config,
    abstract_state: Any,
    say: Callable[[str], None],
    data: Sequence[Mapping[str, Any]] = (),
) -> Any | None:
    """The state of the newest checkpoint that is as it was saved, or None where there is none yet.

    One that can be read may still have a flipped bit: its digests must be those of its receipt.

    Those that cannot are moved to `WORKDIR/damaged_checkpoints` once an older one was read, which proves that
    it was not the storage. All processes call this, and take the same checkpoint.

    Args:
      checkpoints: of the run.
      config: the run's.
      abstract_state: ShapeDtypeStructs with shardings.
      say: gets a line for each that was passed over, and one where its data cannot be compared.
      data: the identities of the run's record sets (input_pipeline/records.py).

    Raises:
      CheckpointError: the newest one is of another run, other data or another model, or none can be read.
    """
    damaged: list[tuple[int, str]] = []
    for step in sorted(checkpoints.all_steps(), reverse=True):
        folder = checkpoints.directory / str(step)
        state, record, stored, fault = _read_saved(folder, config, abstract_state)
        if fault and "://" in str(folder):  # a network may have been down for a moment
            state, record, stored, fault = _read_saved(folder, config, abstract_state)
        if jax.process_count() > 1 and multihost_utils.process_allgather(fault is not None).any():
            fault = fault or "another process cannot read it"
        if fault is None and (wrong := receipt.contradictions(record, state)):
            fault = f"it was read, but is not what was saved: {', '.join(wrong)}"
        if fault is None:
            check_same_data(step, stored, data, say)
            _move_aside(checkpoints, [step for step, _ in damaged])
            return state
        say(f"checkpoint {step} is damaged, trying the one before ({fault})")
        damaged.append((step, fault))
    if damaged:
        raise CheckpointError(
            f"{checkpoints.directory}: none of the checkpoints"
            f" {', '.join(str(step) for step, _ in damaged)} can be read ({damaged[0][1]});"
            " put back a copy, or start with another --workdir"
        )
    return None


def _read_saved(
    folder: epath.Path, config: config_lib.Config, abstract_state: Any
) -> tuple[Any, dict[str, Any], list[dict[str, Any]] | None, str | None]:
    """(state, record, what it says of its data, None) of a checkpoint; the last is what is wrong with it."""
    try:
        check_same_run(folder, config)
        state = restore(folder, abstract_state)
        return state, read_json(folder, "receipt"), read_data(folder), None
    except errors.UserError:
        raise
    except Exception as error:  # whatever a reader makes of bytes that nobody wrote
        _silence_half_read()
        while error.__cause__ is not None:  # Orbax wraps what TensorStore says
            error = error.__cause__
        return None, {}, None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@functools.cache  # once is enough
def _silence_half_read() -> None:
    """Where one array cannot be read, Orbax leaves the reading of others behind; its complaints are pages long."""
    before = sys.unraisablehook

    def hook(unraisable):
        reader = getattr(unraisable.object, "__name__", "") == "_read_array_index_and_device_put"
        if not reader and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _move_aside(checkpoints: Manager, steps: list[int]) -> None:
    if not steps:
        return
    if jax.process_index() == 0:
        aside = checkpoints.directory.parent / "damaged_checkpoints"
        aside.mkdir(exist_ok=True)
        for step in steps:
            if (aside / str(step)).exists():
                (aside / str(step)).rmtree()
            (checkpoints.directory / str(step)).rename(aside / str(step))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints moved")
    checkpoints.reload()


def _reader(handler: Callable[..., ocp.CheckpointHandler]) -> ocp.Checkpointer:
    """A reader that waits for no other process: one that fails would leave the others at a barrier."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    return ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone)


def read_json(folder: epath.PathLike, item: str) -> dict[str, Any]:
    """The item `config` or `receipt` of the checkpoint `folder`."""
    with _reader(ocp.JsonCheckpointHandler) as reader:
        return reader.restore(_absolute(folder) / item)


def check_same_run(folder: epath.Path, config: config_lib.Config) -> None:
    """Raises CheckpointError where the config in the checkpoint `folder` orders the data in another way."""
    stored = config_lib.select(read_json(folder, "config"), {"order"})
    faults = [
        f"{name}: the run in this workdir has {stored.get(name)!r}, got {new!r}"
        for name, new in config_lib.select(dataclasses.asdict(config), {"order"}).items()
        if stored.get(name) != new
    ]
    if faults:
        raise CheckpointError(
            "\n".join(faults)
            + "\nThe order of the data depends on these; use another --workdir, or the old values."
        )


def read_data(folder: epath.PathLike) -> list[dict[str, Any]] | None:
    """The identities of the record sets in the checkpoint `folder`; None: it is older than their record."""
    folder = _absolute(folder)
    return read_json(folder, "data")["sets"] if (folder / "data").is_dir() else None


def check_same_data(
    step: int,
    stored: Sequence[Mapping[str, Any]] | None,
    data: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
) -> None:
    """Raises CheckpointError, a line a set, where `data` is not what the run has seen.

    Args:
      step: of the checkpoint.
      stored: the identities in it, as `read_data` gives them.
      data: those of the config's sets now.
      say: gets a line where it cannot be told, because the checkpoint is older than the record of it or
        because the digests are of different things.
    """
    if stored is None:
        if data:
            say(
                f"checkpoint {step} has no record of its data: whether the sets are the same is not known"
            )
        return
    faults = []
    for then, now in zip(stored, data, strict=True):  # the config names the same sets
        changes = []
        shards = [len(one["shard_lengths"]) for one in (then, now)]
        records = [sum(one["shard_lengths"]) for one in (then, now)]
        comparable = then["digest_of"] == now["digest_of"]
        if shards[0] != shards[1]:
            changes.append(f"shards {shards[0]} -> {shards[1]}")
        if records[0] != records[1]:
            changes.append(f"records {records[0]} -> {records[1]}")
        if not changes and then["shard_lengths"] != now["shard_lengths"]:
            changes.append("records a shard")
        if comparable and then["digest"] != now["digest"]:
            changes.append("content")
        if changes:
            faults.append(
                f"{now['name']} ({now['split']}): not the set that checkpoint {step} was trained on:"
                f" {', '.join(changes)}. Put that one back (input.data_dir) to go on, or start anew with"
                " another --workdir"
            )
        elif not comparable:
            say(
                f"{now['name']} ({now['split']}): as many shards and records as checkpoint {step} was trained"
                f" on; the content cannot be compared, a digest of {then['digest_of']} with one of"
                f" {now['digest_of']}"
            )
    if faults:
        raise CheckpointError("\n".join(faults))


def placed(state: Any, shardings: Any) -> Any:
    """A tree of ShapeDtypeStructs with the shardings of an equal tree: what `restore` takes."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        shardings,
    )


def restore(folder: epath.PathLike, abstract_state: Any) -> Any:
    """The state in the checkpoint `folder`, placed as `abstract_state` (ShapeDtypeStructs with shardings) says.

    On which devices, meshes and processes it was saved does not matter.

    Raises:
      CheckpointError: what is stored has other names, shapes or types than `abstract_state`.
      Exception: whatever else a reader says of a damaged checkpoint.
    """
    folder, expected = _absolute(folder), abstract_state._asdict()
    stored = _metadata(folder / "state")
    if not jax.tree.leaves(stored):  # what Orbax makes of metadata that it cannot read
        raise OSError(f"{folder / 'state'}: its metadata is gone")
    new = {
        name: expected.pop(name) for name in _NEW_PARTS if name in expected and name not in stored
    }
    faults = _differences(stored, expected)
    if faults:
        more = len(faults) - _DIFFERENCES
        raise CheckpointError(
            f"checkpoint {folder.name} does not fit the config (start with another --workdir, or restore the"
            " model's keys):\n"
            + "\n".join(faults[:_DIFFERENCES])
            + (f"\n  and {more} more" if more > 0 else "")
        )
    with _reader(ocp.StandardCheckpointHandler) as reader:
        restored = reader.restore(folder / "state", args=ocp.args.StandardRestore(expected))
    return type(abstract_state)(**restored, **jax.tree.map(_zeros, new))


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros, placed as `x` says."""
    zeros = np.zeros(x.shape, x.dtype)
    return jax.make_array_from_callback(x.shape, x.sharding, lambda index: zeros[index])


def _differences(stored: Any, expected: Any) -> list[str]:
    """A line for each array that differs; a part of the tree that only one side has is one line."""

    def nested(tree):
        root: dict = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            *parents, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            node = root
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = f"{tuple(leaf.shape)} {np.dtype(leaf.dtype)}"
        return root

    def words(node):
        if not isinstance(node, dict):
            return node
        return f"{len(jax.tree.leaves(node))} arrays" if node else "nothing"

    def walk(old, new, path):
        if isinstance(old, dict) and isinstance(new, dict) and bool(old) == bool(new):
            for key in sorted(old | new):
                yield from walk(old.get(key, {}), new.get(key, {}), [*path, key])
        elif old != new:
            yield f"  {'/'.join(path)}: stored {words(old)}, expected {words(new)}"

    lines = walk(nested(stored), nested(expected), [])
    # What the optimiser keeps for a parameter only repeats the parameter's own line.
    return sorted(lines, key=lambda line: not line.startswith("  params"))


def save_model(folder: epath.PathLike, model: config_lib.Model, params: Any, **notes: Any) -> None:
    """Writes a model alone: `params/`, and `config.json` with `model`, `notes` (where it came from) and digests."""
    folder = _absolute(folder)
    folder.mkdir(parents=True, exist_ok=True)
    params = jax.tree.map(np.asarray, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params, force=True)
    content = {"model": dataclasses.asdict(model), **notes, "digests": _digests(model, params)}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _digests(model: config_lib.Model, params: Any) -> dict[str, str]:
    """What tells a model from a damaged one. The tokenizer's path may be edited, so it does not count."""
    text = dataclasses.replace(model.text, tokenizer="")
    described = config_lib.without_new_fields(dataclasses.replace(model, text=text))
    return {"model": receipt.sha256(described), "params": digests.of_arrays(params)}


def load_model(path: epath.PathLike) -> tuple[config_lib.Model, Any, str]:
    """The model in a training workdir (newest checkpoint), a checkpoint folder, or a converted folder.

    What is read must have the digests that were stored with it. Of a workdir, a damaged checkpoint is
    passed over with a warning, as the trainer does. Of a run that keeps an average (`ema_decay`), the
    average is returned.

    Returns:
      (model config, parameters as a nested dict of float32 numpy arrays, the folder that was read).

    Raises:
      CheckpointError: no such folder, none of the three kinds, or it is damaged.
    """
    path = _absolute(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder; expected a workdir, a checkpoint or a converted model"
        )
    if (path / "config.json").exists() and (path / "params").is_dir():
        model, params, fault = _try_to_read(_read_converted, path)
        if fault:
            raise CheckpointError(f"{path}: damaged: {fault}; convert again, or put back a copy")
        return model, params, str(path)
    folders = [path]
    if (path / "checkpoints").is_dir():
        steps = finished_steps(path)
        if not steps:
            raise CheckpointError(f"{path}: holds no finished checkpoint yet")
        folders = [path / "checkpoints" / str(step) for step in reversed(steps)]
    elif not (path / "state").is_dir():
        raise CheckpointError(
            f"{path}: neither a workdir (checkpoints/), nor a checkpoint (state/), nor a converted model"
            " (params/ and config.json)"
        )
    for folder in folders:
        model, params, fault = _try_to_read(_read_checkpoint, folder)
        if not fault:
            return model, params, str(folder)
        if folder != folders[-1]:
            logging.warning("%s is damaged, reading the checkpoint before it (%s)", folder, fault)
    others = "" if len(folders) == 1 else ", and those before it are damaged too"
    raise CheckpointError(f"{folder}: damaged: {fault}{others}; put back a copy")


def _try_to_read(
    read: Callable[[epath.Path], tuple[config_lib.Model, Any]], folder: epath.Path
) -> tuple[Any, Any, str | None]:
    """(model, params, None), or (None, None, what is wrong)."""
    for last in (False, True):
        try:
            return *read(folder), None
        except MemoryError:
            raise
        except Exception as error:  # whatever a reader makes of bytes that nobody wrote
            _silence_half_read()
            while error.__cause__ is not None:  # Orbax wraps what TensorStore says
                error = error.__cause__
            name = "" if isinstance(error, errors.UserError) else f"{type(error).__name__}: "
            fault = f"{name}{' '.join(str(error).split())[:200]}"
        if last or "://" not in str(folder):  # a network may have been down for a moment
            return None, None, fault
    raise AssertionError("the second attempt is the last")


def _read_converted(folder: epath.Path) -> tuple[config_lib.Model, Any]:
    """The model of `save_model`; one that was written without digests is taken as it is."""
    content = json.loads((folder / "config.json").read_text())
    if not isinstance(content, dict) or "model" not in content:
        raise CheckpointError("config.json has no key model")
    model = config_lib.model_from_dict(content["model"])
    params = _read(folder / "params")
    if "digests" in content:
        for part, digest in _digests(model, params).items():
            if content["digests"].get(part) != digest:
                raise CheckpointError(f"{part}: not what config.json has the digest of")
    return model, params


def _read_checkpoint(folder: epath.Path) -> tuple[config_lib.Model, Any]:
    """The model of a run's checkpoint, compared with its record."""
    record = read_json(folder, "receipt")
    config = config_lib.from_dict(read_json(folder, "config"))
    if receipt.config_sha256(config) != record["config"]:
        raise CheckpointError("config: not what the receipt has the hash of")
    which = "ema_params" if _metadata(folder / "state").get("ema_params") else "params"
    params = _read(folder / "state", only=which)[which]
    if digests.of_arrays(params) != record["state"][which]:
        raise CheckpointError(f"{which}: not what the receipt has the digest of")
    return config.model, params


def _metadata(folder: epath.Path) -> Any:
    # Orbax warns that an item has no metadata of its own; it lies beside the items.
    logging.getLogger("absl").setLevel(logging.ERROR)
    with _reader(ocp.PyTreeCheckpointHandler) as reader:
        metadata = reader.metadata(folder)
    metadata = getattr(metadata, "item_metadata", metadata)
    return getattr(metadata, "tree", metadata)


def _read(folder: epath.Path, only: str | None = None) -> Any:
    """The tree in `folder` as numpy arrays, or just its part `only`; device layout does not matter."""
    tree = _metadata(folder)
    if only is not None:
        tree = {only: tree[only]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with _reader(ocp.PyTreeCheckpointHandler) as reader:
        return reader.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=tree, restore_args=as_numpy, partial_restore=only is not None
            ),
        )
