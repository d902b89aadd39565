"""Checkpoints on disk, by Orbax: a run's states under `WORKDIR/checkpoints/STEP`, or a model alone in a folder.

A run's checkpoint has the items `state` (the TrainState; its step is the only data state there is) and
`config` (the resolved config). A converted model is a folder with `config.json` ({"model": ...}) and
`params/`. `load_model` reads either.
"""

import dataclasses
import json
import logging
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from grain_jax import config as config_lib
from grain_jax import errors


class CheckpointError(errors.UserError):
    """There is no usable checkpoint where one was named; the message is one line."""


def manager(workdir: epath.PathLike, config: config_lib.Config) -> ocp.CheckpointManager:
    """The run's checkpoint manager: asynchronous, keeps the last `checkpoint_keep`."""
    return ocp.CheckpointManager(
        epath.Path(workdir).absolute() / "checkpoints",
        options=ocp.CheckpointManagerOptions(
            max_to_keep=config.checkpoint_keep, enable_async_checkpointing=True
        ),
        # With the handlers known, a fresh manager can say what a checkpoint holds before it reads it.
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        },
    )


def save(checkpoints: ocp.CheckpointManager, state: Any, config: config_lib.Config) -> None:
    """Starts to write `state` under its own step; training goes on meanwhile."""
    step = int(state.step)
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            config=ocp.args.JsonSave(dataclasses.asdict(config)),
        ),
    )


# What of a config decides which examples a step sees. A run that changes it is another run.
_ORDER_OF_DATA = (
    "seed",
    "batch_size",
    "input.lanes",
    "input.shards_per_block",
    "input.name",
    "input.source",
)


def check_same_run(
    checkpoints: ocp.CheckpointManager, step: int, config: config_lib.Config
) -> None:
    """Raises CheckpointError where the checkpoint's config orders the data in another way than `config`."""
    stored = checkpoints.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))[
        "config"
    ]
    faults = []
    for name in _ORDER_OF_DATA:
        old, new = stored, dataclasses.asdict(config)
        for key in name.split("."):
            old, new = old[key], new[key]
        if old != new:
            faults.append(f"{name}: the run in this workdir has {old!r}, got {new!r}")
    if faults:
        raise CheckpointError(
            "\n".join(faults)
            + "\nThe order of the data depends on these; use another --workdir, or the old values."
        )


def restore(checkpoints: ocp.CheckpointManager, step: int, abstract_state: Any) -> Any:
    """The state of that step, placed as `abstract_state` (ShapeDtypeStructs with shardings) says.

    Raises:
      CheckpointError: what is stored has other names or shapes than `abstract_state`.
    """
    stored = checkpoints.item_metadata(step)["state"]
    expected = abstract_state._asdict()
    faults = _differences(stored.tree if hasattr(stored, "tree") else stored, expected)
    if faults:
        raise CheckpointError(
            f"checkpoint {step} does not fit the config (start with another --workdir, or restore the"
            " model's keys):\n" + "\n".join(faults)
        )
    restored = checkpoints.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(expected))
    )["state"]
    return type(abstract_state)(**restored)


def _differences(stored: Any, expected: Any) -> list[str]:
    flat = lambda tree: {  # noqa: E731
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    old, new = flat(stored), flat(expected)
    return [
        f"  {name}: stored {old.get(name, 'nothing')}, expected {new.get(name, 'nothing')}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]


def save_model(folder: epath.PathLike, model: config_lib.Model, params: Any, **notes: Any) -> None:
    """Writes a model alone: `config.json` with `model` and `notes` (where it came from), and `params/`."""
    folder = epath.Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", jax.tree.map(np.asarray, params), force=True)
    text = json.dumps({"model": dataclasses.asdict(model), **notes}, indent=2) + "\n"
    (folder / "config.json").write_text(text)


def load_model(path: epath.PathLike) -> tuple[config_lib.Model, Any, str]:
    """The model in a training workdir (newest checkpoint), a checkpoint folder, or a converted folder.

    Of a run that keeps an average (`ema_decay`), the average is returned.

    Returns:
      (model config, parameters as a nested dict of float32 numpy arrays, the folder that was read).

    Raises:
      CheckpointError: no such folder, or none of the three kinds.
    """
    path = epath.Path(path).absolute()
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder; expected a workdir, a checkpoint or a converted model"
        )
    if (path / "params").is_dir() and (path / "config.json").exists():
        try:
            stored = json.loads((path / "config.json").read_text())["model"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path / 'config.json'}: got {error}, expected JSON with the key model"
            ) from None
        return config_lib.model_from_dict(stored), _read(path / "params"), str(path)
    if (path / "checkpoints").is_dir():
        steps = [p for p in (path / "checkpoints").iterdir() if p.name.isdigit()]
        if not steps:
            raise CheckpointError(f"{path}: holds no finished checkpoint yet")
        path = max(steps, key=lambda p: int(p.name))
    if not (path / "state").is_dir():
        raise CheckpointError(
            f"{path}: neither a workdir (checkpoints/), nor a checkpoint (state/), nor a converted model"
            " (params/ and config.json)"
        )
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        model = config_lib.model_from_dict(reader.restore(path / "config")["model"])
    names = _metadata(path / "state")
    which = "ema_params" if names.get("ema_params") else "params"
    return model, _read(path / "state", only=which)[which], str(path)


def _metadata(folder: epath.Path) -> Any:
    # Orbax warns that an item has no metadata of its own; it lies beside the items.
    logging.getLogger("absl").setLevel(logging.ERROR)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        metadata = reader.metadata(folder)
    metadata = getattr(metadata, "item_metadata", metadata)
    return getattr(metadata, "tree", metadata)


def _read(folder: epath.Path, only: str | None = None) -> Any:
    """The tree in `folder` as numpy arrays, or just its part `only`; device layout does not matter."""
    tree = _metadata(folder)
    if only is not None:
        tree = {only: tree[only]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=tree, restore_args=as_numpy, **({"partial_restore": True} if only else {})
            ),
        )
