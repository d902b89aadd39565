"""A model alone on disk: a folder with `params/` and `config.json`, as conversions write it.

`load_model` also reads the model of the checkpoint of a run, by path or by name.
"""

import dataclasses
import json
import logging
from typing import Any, NamedTuple, NotRequired, TypedDict

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from grain_jax import config as config_lib
from grain_jax.checkpoint import digests, files, pretrained
from grain_jax.checkpoint.files import CheckpointError
from grain_jax.core import low_rank, regular_file


class _Converted(TypedDict):
    """What is read of the config.json of `save_model`; one without digests, as of a hand, is not checked."""

    model: dict[str, Any]
    digests: NotRequired[dict[str, str]]


def save_model(folder: epath.PathLike, model: config_lib.Model, params: Any, **notes: Any) -> None:
    """Writes `params/`, and `config.json` with `model`, `notes` (such as its source) and digests."""
    folder = files.absolute(folder)
    folder.mkdir(parents=True, exist_ok=True)
    params = jax.tree.map(np.asarray, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params, force=True)
    content = {"model": dataclasses.asdict(model), **notes, "digests": model_digests(model, params)}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def model_digests(model: config_lib.Model, params: Any) -> dict[str, str]:
    """Digests that show damage. The path of the tokenizer may be edited, so it does not count."""
    text = dataclasses.replace(model.text, tokenizer="")
    described = config_lib.without_defaults(dataclasses.replace(model, text=text))
    return {"model": digests.of_json(described), "params": digests.of_arrays(params)}


def find(path: epath.PathLike) -> epath.Path:
    """The folder that `path` names, as `load_model` takes it; one of the Hub is downloaded.

    Raises:
      CheckpointError: there is none.
      errors.UserError: it cannot be downloaded.
    """
    folder = files.absolute(pretrained.folder_of(path))
    if not folder.is_dir():
        raise CheckpointError(pretrained.no_such(path))
    return folder


class Stored(NamedTuple):
    """A model as it is stored, factors of LoRA beside their matrices."""

    model: config_lib.Model
    params: Any  # nested dict of float32 numpy arrays
    folder: str  # that was read
    lora: config_lib.Lora = config_lib.Lora()  # of the run

    def merged(self) -> Any:
        """The parameters with the factors folded in."""
        return low_rank.merged(self.params, self.lora.scale) if self.lora.rank else self.params


def load_model(path: epath.PathLike) -> tuple[config_lib.Model, Any, str]:
    """The model of `load_stored`, with factors of LoRA folded into their matrices.

    Returns:
      (model config, parameters as a nested dict of float32 numpy arrays, the folder that was read).

    Raises:
      CheckpointError, errors.UserError: as `load_stored`.
    """
    stored = load_stored(path)
    return stored.model, stored.merged(), stored.folder


def load_stored(path: epath.PathLike) -> Stored:
    """The model in a training workdir (newest checkpoint), a checkpoint or a converted folder.

    The model must have the digests that were stored with it. In a workdir a damaged checkpoint is passed over
    with a warning. A run with an average of the parameters (`ema_decay`) gives the average.

    Args:
      path: the folder; or a name, of the package or of the Hugging Face Hub (`pretrained.folder_of`).

    Raises:
      CheckpointError: no such folder, none of the three kinds, or it is damaged.
      errors.UserError: a model of the Hub cannot be downloaded or converted.
    """
    path = find(path)
    if (path / "config.json").exists() and (path / "params").is_dir():
        stored, fault = files.attempt(lambda: _read_converted(path), path, MemoryError)
        if fault:
            raise CheckpointError(f"{path}: damaged: {fault}; convert again, or put back a copy")
        if factors := next(low_rank.maps_in(stored.params), None):
            raise CheckpointError(
                f"{path}: {factors} has factors of LoRA, whose scale a converted folder does not hold;"
                " expected the run, or what `grain-jax convert average` makes of it"
            )
        return stored
    folders = [path]
    if (path / "checkpoints").is_dir():
        steps = files.finished_steps(path)
        if not steps:
            raise CheckpointError(f"{path}: holds no finished checkpoint yet")
        folders = [path / "checkpoints" / str(step) for step in reversed(steps)]
    elif not (path / "state").is_dir():
        raise CheckpointError(
            f"{path}: neither a workdir (checkpoints/), nor a checkpoint (state/), nor a converted model"
            " (params/ and config.json)"
        )
    for folder in folders:
        stored, fault = files.attempt(lambda x=folder: _read_checkpoint(x), folder, MemoryError)
        if not fault:
            return stored
        if folder != folders[-1]:
            logging.warning("%s is damaged, reading the checkpoint before it (%s)", folder, fault)
    others = "" if len(folders) == 1 else ", and those before it are damaged too"
    raise CheckpointError(f"{folder}: damaged: {fault}{others}; put back a copy")


def _read_converted(folder: epath.Path) -> Stored:
    """The model of `save_model`."""
    content = regular_file.read_json(folder / "config.json", _Converted, "a converted model's")
    model = config_lib.model_from_dict(content["model"])
    params = files.read_arrays(folder / "params")
    if "digests" in content:
        actual = model_digests(model, params)
        for part in {**actual, **content["digests"]}:  # a part may be missing
            if content["digests"].get(part) != actual.get(part):
                raise CheckpointError(f"{part}: not what config.json has the digest of")
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    return Stored(model, params, str(folder))


def _read_checkpoint(folder: epath.Path) -> Stored:
    """The model of a checkpoint, compared with its digests."""
    items = files.read_items(folder)
    config = config_lib.from_dict(items.config)
    which = "ema_params" if files.metadata_of(folder).get("ema_params") else "params"
    params = files.read_arrays(folder, only=which)[which]
    if digests.of_arrays(params) != items.digests["state"][which]:
        raise CheckpointError(f"{which}: not what was saved")
    params.pop("terms", None)  # of local loss terms: no part of the model
    return Stored(config.model, params, str(folder), config.optim.lora)
