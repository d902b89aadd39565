"""The checkpoints of a run, by Orbax: its states under `WORKDIR/checkpoints/STEP`.

A checkpoint has the items `state` (the TrainState; its step is the position in the data), `config` (the resolved
config), `data` (the identities of its record sets) and `digests` (of these three).
"""

import dataclasses
import functools
import json
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
from grain_jax.checkpoint import digests
from grain_jax.checkpoint.files import (
    CheckpointError,
    Items,
    absolute,
    attempt,
    finished_steps,
    metadata_of,
    open_reader,
    read_items,
)
from grain_jax.core import errors

_DIFFERENCES = 30  # lines of a message


class Manager(ocp.CheckpointManager):
    """An Orbax CheckpointManager with two overrides."""

    def reached_preemption(self, step: int) -> bool:
        """Never: the preemption handler asks JAX itself, by another count of calls (ending.py)."""
        del step
        return False

    def metrics(self, step: int) -> Any:
        """The metrics of a checkpoint; None where it has none or they are damaged, for its state may be whole."""
        try:
            return super().metrics(step)
        except ValueError:
            return None


def newest_config(workdir: epath.PathLike) -> tuple[config_lib.Config | None, str]:
    """The config of the newest checkpoint whose config is whole, and the name of that checkpoint; or (None, "")."""
    for step in reversed(finished_steps(workdir)):
        try:
            stored = read_items(absolute(workdir) / "checkpoints" / str(step))
            return config_lib.from_dict(stored.config), f"checkpoint {step}"
        except Exception:  # damaged; `restore_newest` says so, and takes the one before
            continue
    return None, ""


def manager(workdir: epath.PathLike, config: config_lib.Config) -> Manager:
    """The checkpoint manager of a run, asynchronous. It removes what an unfinished save has left.

    It keeps the last `checkpoint_keep`, those of every `checkpoint_keep_every` steps, and the best by
    `checkpoint_best_metric`.
    """
    kept: list[PreservationPolicy] = [LatestN(config.checkpoint_keep)]
    if config.checkpoint_keep_every:
        kept.append(EveryNSteps(config.checkpoint_keep_every))
    best_fn = None
    if config.checkpoint_best_metric:
        best_fn = lambda metrics: metrics[config.checkpoint_best_metric]
        kept.append(
            BestN(
                get_metric_fn=best_fn,
                reverse=config.checkpoint_best_mode == "min",
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    return Manager(
        absolute(workdir) / "checkpoints",
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
            "data": ocp.JsonCheckpointHandler(),
            "digests": ocp.JsonCheckpointHandler(),
        },
    )


def save(
    checkpoints: Manager,
    state: Any,
    config: config_lib.Config,
    metrics: Mapping[str, float] | None = None,
    data: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Starts to write `state` under its step, and does not wait for it. All processes must call it.

    Args:
      checkpoints: of the run.
      state: the TrainState.
      config: of the run.
      metrics: those of this step, of which `checkpoint_best_metric` is stored; the same on all processes.
      data: the identities of the run's record sets (input_pipeline/records.py).
    """
    step, name = int(state.step), config.checkpoint_best_metric
    content, sets = dataclasses.asdict(config), {"sets": list(data)}
    of_items = {"config": digests.of_json(content), "data": digests.of_json(sets)}
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            config=ocp.args.JsonSave(content),
            data=ocp.args.JsonSave(sets),
            digests=ocp.args.JsonSave({**of_items, "state": digests.of_state(state)}),
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
    """The state of the newest undamaged checkpoint, or None where there is no checkpoint.

    A checkpoint is damaged where it cannot be read or its digests are others; only a whole one is
    compared with the config. Damaged ones are
    moved to `WORKDIR/damaged_checkpoints` once an older one was read, which proves that the storage works. All
    processes call this, and get the same checkpoint.

    Args:
      checkpoints, config: of the run.
      abstract_state: ShapeDtypeStructs with shardings.
      say: gets a line for each damaged checkpoint, one where the data cannot be compared, and one that names the keys
        that change what a step computes.
      data: the identities of the run's record sets (input_pipeline/records.py).

    Raises:
      CheckpointError: the newest one is of another run, other data or another model, or none can be read.
    """
    damaged: dict[int, str] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        folder = checkpoints.directory / str(step)
        read = functools.partial(_read_saved, folder, config, abstract_state)
        found, fault = attempt(read, folder, errors.UserError)
        state, stored = found or (None, None)
        if jax.process_count() > 1 and multihost_utils.process_allgather(fault is not None).any():
            fault = fault or "another process cannot read it"
        if stored and fault is None and digests.of_state(state) != stored.digests["state"]:
            fault = "it was read, but is not what was saved: state"
        if stored and fault is None:
            check_same_data(step, stored.data, data)
            if changed := _other_numbers(stored.config, config):
                say(f"goes on with other values than checkpoint {step}: {', '.join(changed)}")
            _move_aside(checkpoints, list(damaged))
            return state
        say(f"checkpoint {step} is damaged, trying the one before ({fault})")
        damaged[step] = str(fault)
    if damaged:
        raise CheckpointError(
            f"{checkpoints.directory}: none of the checkpoints {', '.join(map(str, damaged))} can be read"
            f" ({next(iter(damaged.values()))}); put back a copy, or start with another --workdir"
        )
    return None


def _read_saved(
    folder: epath.Path, config: config_lib.Config, abstract_state: Any
) -> tuple[Any, Items]:
    """(state, all else) of a checkpoint."""
    items = read_items(folder)
    check_same_run(items.config, config)
    return restore(folder, abstract_state), items


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


def _without_evals(content: dict[str, Any]) -> config_lib.Config:
    """The config in JSON; its evaluations decide nothing, and may be of classes that are gone."""
    return config_lib.from_dict(content | {"evals": {}, "checkpoint_best_metric": ""})


def _other_numbers(stored: dict[str, Any], config: config_lib.Config) -> list[str]:
    """`KEY OLD -> NEW` of each key that has another value than in the `stored` config and changes later steps.

    Those are of the role "numbers", and the length of the run, over which schedules stretch.
    """
    contents = stored, json.loads(config_lib.to_json(config))
    old, new = (
        config_lib.select(found, {"numbers"})
        | dict(total_steps=found.total_steps, total_epochs=found.total_epochs)
        for found in map(_without_evals, contents)
    )
    return [
        f"{key} {old.get(key)!r} -> {new.get(key)!r}"
        for key in old | new  # options of a class may be in one of them alone
        if old.get(key) != new.get(key)
    ]


def check_same_run(content: dict[str, Any], config: config_lib.Config) -> None:
    """Raises CheckpointError where a stored config has another order of the data, or scale of LoRA, than `config`."""
    of_run = _without_evals(content)
    stored = config_lib.select(of_run, {"order"})
    new = config_lib.select(config, {"order"})
    faults = [
        f"{name}: the run in this workdir has {stored.get(name)!r}, got {new.get(name)!r}"
        for name in stored | new  # options of a class may be in one of them alone
        if stored.get(name) != new.get(name)
    ]
    if faults:
        raise CheckpointError(
            "\n".join(faults)
            + "\nThe order of the data depends on these; use another --workdir, or the old values."
        )
    old, lora = of_run.optim.lora, config.optim.lora
    if old.rank and old.alpha != lora.alpha:  # another rank does not fit, and says so
        raise CheckpointError(
            f"optim.lora.alpha: the run in this workdir has {old.alpha:g}, got {lora.alpha:g}; with the factors stored it"
            " makes another model: use another --workdir, or the old value"
        )


def check_same_data(
    step: int,
    stored: Sequence[Mapping[str, Any]],
    data: Sequence[Mapping[str, Any]],
) -> None:
    """Raises CheckpointError, a line a set, where `data` is not the data of the checkpoint.

    Args:
      step: of the checkpoint.
      stored: the identities in it, as `read_data` gives them.
      data: the identities of the sets of the config.
    """
    faults = []
    for then, now in zip(stored, data, strict=True):  # the config names the same sets
        changes = []
        for what, count in (("shards", len), ("records", sum)):
            before, here = (count(one["shard_lengths"]) for one in (then, now))
            if before != here:
                changes.append(f"{what} {before} -> {here}")
        if not changes and then["shard_lengths"] != now["shard_lengths"]:
            changes.append("records a shard")
        if not changes and then["digest"] != now["digest"]:
            changes.append("content")
        name = f"{now['name']} ({now['split']})"
        if changes:
            faults.append(
                f"{name}: not the set that checkpoint {step} was trained on: {', '.join(changes)}. Put that one"
                " back (input.data_dir) to go on, or start anew with another --workdir"
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
    """The state in the checkpoint `folder`, placed by `abstract_state` (ShapeDtypeStructs with shardings).

    It may have been saved on other devices, meshes and processes.

    Raises:
      CheckpointError: what is stored has other names, shapes or types than `abstract_state`.
      Exception: another error of a reader, about a damaged checkpoint.
    """
    folder, expected = absolute(folder), abstract_state._asdict()
    stored = metadata_of(folder / "state")
    if not jax.tree.leaves(stored):  # what Orbax makes of metadata that it cannot read
        raise OSError(f"{folder / 'state'}: its metadata is gone")
    faults = _differences(stored, expected)
    if faults:
        more = len(faults) - _DIFFERENCES
        raise CheckpointError(
            f"checkpoint {folder.name} does not fit the config (start with another --workdir, or restore the"
            " model's keys):\n"
            + "\n".join(faults[:_DIFFERENCES])
            + (f"\n  and {more} more" if more > 0 else "")
        )
    with open_reader(ocp.StandardCheckpointHandler) as reader:
        restored = reader.restore(folder / "state", args=ocp.args.StandardRestore(expected))
    return type(abstract_state)(**restored)


def _differences(stored: Any, expected: Any) -> list[str]:
    """A line for each array that differs; those of parameters first, as what the optimiser keeps for one repeats them."""

    def flat(tree: Any) -> dict[str, str]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.shape} {np.dtype(x.dtype)}"
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }

    old, new = flat(stored), flat(expected)
    lines = [
        f"  {name}: stored {old.get(name, 'nothing')}, expected {new.get(name, 'nothing')}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]
    return sorted(lines, key=lambda line: not line.startswith("  params"))
