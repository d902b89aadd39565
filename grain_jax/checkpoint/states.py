"""The checkpoints of a run, by Orbax: its states under `WORKDIR/checkpoints/STEP`.

A checkpoint holds the TrainState, whose step is the position in the data, and the `files.Items`: the resolved
config, the identities of its record sets, and digests of all three.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from grain_jax import config as config_lib
from grain_jax.checkpoint import digests
from grain_jax.checkpoint.files import (
    CheckpointError,
    Items,
    absolute,
    attempt,
    finished_steps,
    metadata_of,
    read_items,
    this_process,
)
from grain_jax.core import errors
from grain_jax.runtime import processes

policies = ocp.training.preservation_policies

_DIFFERENCES = 30  # lines of a message
# Devices with copies of an array share its writing if each part has so many bytes; smaller ones take longer.
_LEAST_PART = 1 << 20


def newest_config(workdir: epath.PathLike) -> tuple[config_lib.Config | None, str]:
    """The newest whole config of a checkpoint, and the name of that checkpoint; or (None, "")."""
    for step in reversed(finished_steps(workdir)):
        try:
            stored = read_items(absolute(workdir) / "checkpoints" / str(step))
            return config_lib.from_dict(stored.config), f"checkpoint {step}"
        except Exception:  # damaged; `restore_newest` says so, and takes the one before
            continue
    return None, ""


class Checkpoints:
    """The checkpoints of a run, saved in the background. All processes have one and call the same methods.

    It keeps the last `checkpoint_keep`, one at every `checkpoint_keep_every` steps, and the best by
    `checkpoint_best_metric`. It removes what an unfinished save has left.
    """

    def __init__(self, workdir: epath.PathLike, config: config_lib.Config):
        self._config = config
        self.directory = absolute(workdir) / "checkpoints"
        kept: list[Any] = [policies.LatestN(config.checkpoint_keep)]
        if config.checkpoint_keep_every:
            kept.append(policies.EveryNSteps(config.checkpoint_keep_every))
        self._best = _Best(config.checkpoint_best_mode)
        if config.checkpoint_best_metric:
            self._best.read(self.directory, finished_steps(workdir))
            kept.append(self._best)
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = _LEAST_PART
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            context=context,
            preservation_policy=cast(Any, policies.AnyPreservationPolicy(kept)),
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None  # what Orbax gave for the last save

    def save(
        self, state: Any, metrics: Mapping[str, float] | None = None, data: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Starts to write `state` under its step, and does not wait for it.

        Args:
          state: the TrainState.
          metrics: of this step; `checkpoint_best_metric` is taken from it. The same on all processes.
          data: the identities of the run's record sets (input_pipeline/records.py).
        """
        step, best = int(state.step), (metrics or {}).get(self._config.checkpoint_best_metric)
        self._best.values[step] = best
        items = Items({}, dataclasses.asdict(self._config), list(map(dict, data)), best)
        items.digests.update(items=digests.of_json(items[1:]), state=digests.of_state(state))
        self.wait()
        self._saving = self._checkpointer.save_async(
            step, state._asdict(), force=True, custom_metadata=items._asdict()
        )

    def wait(self) -> None:
        """Waits for the save under way, and raises its error."""
        saving, self._saving = self._saving, None
        try:
            self._checkpointer.wait()
        finally:
            if saving:
                saving.result()  # nothing else ends its thread and closes its event loop

    def close(self) -> None:
        """Waits for the save under way, and ends the threads."""
        self.wait()
        self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def restore_newest(
        self, abstract_state: Any, say: Callable[[str], None], data: Sequence[Mapping[str, Any]] = ()
    ) -> Any | None:
        """The state of the newest undamaged checkpoint, or None if there is no checkpoint.

        A checkpoint is damaged if it cannot be read or its digests differ; only a whole one is compared with
        the config. Damaged ones move to `WORKDIR/damaged_checkpoints` once an older one was read: the storage
        works. All processes get the same checkpoint, the newest that each of them can read.

        Args:
          abstract_state: ShapeDtypeStructs with shardings.
          say: gets a line for each damaged checkpoint, one if the data cannot be compared, and one that names
            the keys that change what a step computes.
          data: the identities of the run's record sets.

        Raises:
          CheckpointError: the newest one is of another run, other data or another model, or none can be read.
        """
        damaged: dict[int, str] = {}
        steps = processes.of_first(lambda: [found.step for found in self._checkpointer.checkpoints])
        for step in reversed(steps):
            folder = self.directory / str(step)
            read = functools.partial(_read_saved, folder, self._config, abstract_state)
            result, fault = attempt(read, folder, errors.UserError)
            state, items = result or (None, None)
            faults = enumerate(processes.agree(None, fault))
            fault = fault or next((f"process {i}: {words}" for i, words in faults if words), None)
            if items and fault is None and digests.of_state(state) != items.digests["state"]:
                fault = "it was read, but is not what was saved: state"
            if items and fault is None:
                check_same_data(step, items.data, data)
                if changed := _other_numbers(items.config, self._config).items():
                    words = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed)
                    say(f"goes on with other values than checkpoint {step}: {words}")
                self._move_aside(list(damaged))
                return state
            say(f"checkpoint {step} is damaged, trying the one before ({fault})")
            damaged[step] = str(fault)
        if damaged:
            raise CheckpointError(
                f"{self.directory}: none of the checkpoints {', '.join(map(str, damaged))} can be read"
                f" ({next(iter(damaged.values()))}); put back a copy, or start with another --workdir"
            )
        return None

    def _move_aside(self, steps: list[int]) -> None:
        def move() -> None:
            aside = self.directory.parent / "damaged_checkpoints"
            aside.mkdir(exist_ok=True)
            for step in steps:
                if (aside / str(step)).exists():
                    (aside / str(step)).rmtree()
                (self.directory / str(step)).rename(aside / str(step))

        if steps:
            processes.of_first(move)
            self._checkpointer.reload()


class _Best:
    """A preservation policy of Orbax: it keeps the checkpoint with the best value.

    Orbax's own reads the values when a run starts, and a damaged one would end the run.
    """

    def __init__(self, mode: str):
        self._sign = -1 if mode == "min" else 1
        self.values: dict[int, float | None] = {}  # of each step

    def read(self, directory: epath.Path, steps: Sequence[int]) -> None:
        """Reads the values of existing checkpoints; a damaged checkpoint has none."""
        for step in steps:
            items, fault = attempt(functools.partial(read_items, directory / str(step)), directory)
            self.values[step] = None if fault else items.best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint, whether it is the best."""
        del context
        values = {c.step: self.values.get(c.step) for c in checkpoints}
        known = {step: self._sign * value for step, value in values.items() if value is not None}
        best = max(known, key=lambda step: (known[step], step), default=None)
        return [checkpoint.step == best for checkpoint in checkpoints]


def _read_saved(folder: epath.Path, config: config_lib.Config, abstract_state: Any) -> tuple[Any, Items]:
    """(state, all else) of a checkpoint."""
    items = read_items(folder)
    check_same_run(items.config, config)
    try:
        return restore(folder, abstract_state), items
    except CheckpointError:
        changed = _other_numbers(items.config, config)
        of_model = {key: x for key, x in changed.items() if key.startswith("model.")} or changed
        if not of_model:
            raise
        raise CheckpointError(_of_another_run(of_model, "makes another model")) from None


def _without_evals(content: dict[str, Any]) -> config_lib.Config:
    """The config in JSON; its evaluations decide nothing, and may be of classes that are gone."""
    return config_lib.from_dict(content | {"evals": {}, "checkpoint_best_metric": ""})


def _of_another_run(changed: Mapping[str, tuple[Any, Any]], reason: str) -> str:
    """The message about keys with another value than in the run."""
    lines = (f"{key}: the run has {old!r}, got {new!r}" for key, (old, new) in changed.items())
    return "\n".join(lines) + f"\nThis {reason}; use another --workdir, or the old values."


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (old, new) of each that differs; options of a class may be in one of them alone."""
    pairs = {key: (old.get(key), new.get(key)) for key in {**old, **new}}
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}


def _other_numbers(stored: dict[str, Any], config: config_lib.Config) -> dict[str, tuple[Any, Any]]:
    """Key -> (old, new) of each key that differs from the `stored` config and changes later steps.

    Those are of the role "numbers", and the length of the run, over which schedules stretch.
    """
    contents = stored, json.loads(config_lib.to_json(config))
    old, new = (
        config_lib.select(found, {"numbers"})
        | dict(total_steps=found.total_steps, total_epochs=found.total_epochs)
        for found in map(_without_evals, contents)
    )
    return _changed(old, new)


def check_same_run(content: dict[str, Any], config: config_lib.Config) -> None:
    """Raises CheckpointError: a stored config has another order of the data, or scale of LoRA."""
    of_run = _without_evals(content)
    stored, new = (config_lib.select(x, {"order"}) for x in (of_run, config))
    if changed := _changed(stored, new):
        if "batch_size" in changed:  # from which it is derived
            changed.pop("input.lanes", None)
        raise CheckpointError(_of_another_run(changed, "changes the order of the data"))
    old, lora = of_run.optim.lora, config.optim.lora
    if old.rank and old.alpha != lora.alpha:  # another rank does not fit, and says so
        changed = {"optim.lora.alpha": (old.alpha, lora.alpha)}
        reason = "makes another model of the stored factors"
        raise CheckpointError(_of_another_run(changed, reason))


def check_same_data(
    step: int, stored: Sequence[Mapping[str, Any]], data: Sequence[Mapping[str, Any]]
) -> None:
    """Raises CheckpointError, a line a set, where `data` is not the data of the checkpoint.

    Args:
      step: of the checkpoint.
      stored: the identities in it (`files.Items.data`).
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
                f"{name}: not the set that checkpoint {step} was trained on: {', '.join(changes)}."
                " Put that one back (input.data_dir) to go on, or start anew with another --workdir"
            )
    if faults:
        raise CheckpointError("\n".join(faults))


def placed(state: Any, shardings: Any) -> Any:
    """A tree of ShapeDtypeStructs with the shardings of an equal tree: what `restore` takes."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings
    )


def restore(folder: epath.PathLike, abstract_state: Any) -> Any:
    """The state in the checkpoint `folder`, placed by `abstract_state` (ShapeDtypeStructs with shardings).

    It may have been saved on other devices, meshes and processes.

    Raises:
      CheckpointError: what is stored has other names, shapes or types than `abstract_state`.
      Exception: another error of a reader, about a damaged checkpoint.
    """
    folder, expected = absolute(folder), abstract_state._asdict()
    stored = metadata_of(folder)
    if not jax.tree.leaves(stored):  # what Orbax makes of metadata that it cannot read
        raise OSError(f"{folder}: the metadata of its state is gone")
    faults = _differences(stored, expected)
    if faults:
        more = len(faults) - _DIFFERENCES
        raise CheckpointError(
            f"checkpoint {folder.name} does not fit the config (start with another --workdir, or restore the"
            " model's keys):\n"
            + "\n".join(faults[:_DIFFERENCES])
            + (f"\n  and {more} more" if more > 0 else "")
        )
    with this_process():
        restored = ocp.load(folder, expected)
    return type(abstract_state)(**restored)


def _differences(stored: Any, expected: Any) -> list[str]:
    """A line for each array that differs, parameters first: the optimiser's repeat their names."""

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
