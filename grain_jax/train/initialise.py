"""Initialisation from models: `init.image`, `init.text` and `init.decoder` name one for a part of the model.

Every array is accounted for: a missing one is an error, an unused one is reported. Positions are resized to
the sizes of the model.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.checkpoint import saved_model
from grain_jax.core import errors, named
from grain_jax.models import grain, vit
from grain_jax.train import train_step

_KEPT_POSITIONS = 20  # see `resize_text_positions`
_SCALE = ("logit_scale", "logit_bias")  # of two towers that were trained together
# Keys of a part that may differ from the model's: of training or scores alone, resized sizes, reported ones.
_FREE = {
    *("position_init", "position_period", "block_init", "qkv_init_gain"),
    *("class_score", "dropout", "unroll", "keep"),
    *("image_size", "context_length", "tokenizer"),
}
_REPORTED = ("cleaning", "pad_id", "end_id", "mask_padding")


class InitError(errors.UserError):
    """A part cannot start from the model that a config names; the message has one line per fault."""


class Loaded(NamedTuple):
    """The arrays of the named parts, and the lines to report about them."""

    params: dict[str, np.ndarray]  # our flat names -> float32
    report: list[str]


def state_of_step_0(
    config: config_lib.Config, program: train_step.Program, say: Callable[[str], None]
) -> train_step.TrainState:
    """The first state of a run: from its seed, with the parts of `config.init` from their checkpoints.

    Args:
      config: of the run. Every process reads the checkpoints that it names.
      program: of the run.
      say: called with each line of the report.

    Raises:
      InitError: as `load`.
    """
    if {config.init.image, config.init.text, config.init.decoder} == {None}:
        return program.init()
    loaded = load(config)  # before anything is compiled
    state = program.init()
    for line in loaded.report:
        say(line)
    params = _replace(state.params, program.shardings.params, loaded.params)
    average = _replace(state.ema_params, program.shardings.ema_params, loaded.params)
    # Local terms may copy parameters into their state.
    return state._replace(params=params, ema_params=average, term_state=program.term_state(params))


def resize_text_positions(positions: np.ndarray, length: int) -> np.ndarray:
    """Resizes text positions [L, E] to another context length.

    A shorter context keeps the first positions. A longer one keeps the first 20, enough for most texts, and
    interpolates the rest linearly (Long-CLIP, Zhang et al. 2024).
    """
    old = len(positions)
    if length <= old:
        return positions[:length]
    kept = min(_KEPT_POSITIONS, old - 1)
    points = np.concatenate([np.arange(kept), np.linspace(kept, old - 1, length - kept)])
    low = np.minimum(points.astype(int), old - 2)
    share = (points - low)[:, None]
    stretched = (1 - share) * positions[low] + share * positions[low + 1]
    return stretched.astype(np.float32)


def load(config: config_lib.Config) -> Loaded:
    """The arrays of the parts that `config.init` names, checked against `config.model`.

    Raises:
      InitError: its part differs from the config, or arrays are missing; one line per fault.
      CheckpointError: a folder cannot be read.
    """
    model, shapes = config.model, grain.parameter_shapes(config.model)
    params: dict[str, np.ndarray] = {}
    report: list[str] = []
    read = functools.cache(saved_model.load_model)
    for part in ("image", "text", "decoder"):
        path = getattr(config.init, part)
        if path is None:
            continue
        stored, merged, _ = read(path)
        flat = {name: np.asarray(x, np.float32) for name, x in grain.flat(merged).items()}
        names = _names(part, config, stored, shapes)
        faults = _differences(part, stored, model)
        faults += [f"{name}: missing" for name in names if name not in flat]
        lines, arrays = [], {}
        if not faults:
            arrays = {name: flat[name] for name in names}
            lines = [f"{len(arrays)} arrays from {path}", *_resize_positions(config, part, arrays)]
            wrong = {name: x.shape for name, x in arrays.items() if x.shape != shapes[name]}
            faults = [f"{n}: got shape {x}, expected {shapes[n]}" for n, x in wrong.items()]
        if faults:
            raise InitError("\n".join(f"init.{part}: {path}: {fault}" for fault in faults))
        if part == "text":
            lines += _about_texts(stored.text, model.text)
        unused = [name for name in flat if name.startswith("image_") and name not in arrays]
        if part == "image" and unused:
            lines.append(f"not used: {', '.join(unused)}")
        params |= arrays
        report += [f"init.{part}: {line}" for line in lines]
    return Loaded(params, report)


def _names(part: str, config: config_lib.Config, stored: config_lib.Model, shapes: Any) -> list[str]:
    """The parameters of the config's model that a part of a stored model gives."""
    model, init = config.model, config.init
    parts = {part}
    if part == "decoder":  # with a box head where both have the same
        free = {"proposals": False, "object_weight": 0.0}  # of scores alone
        shaped = lambda boxes: dataclasses.replace(boxes, **free)
        parts |= {"scale", "boxes"} if shaped(stored.boxes) == shaped(model.boxes) else {"scale"}
    names = [name for name in shapes if model.part(name) in parts]
    if part == "text" and model.tower_pools and init.image == init.text and not init.decoder:
        names += [name for name in _SCALE if name in shapes]
    return names


def _differences(part: str, stored: config_lib.Model, model: config_lib.Model) -> list[str]:
    """One line per key in which a part of a stored model differs from the config's."""
    got, wanted = getattr(stored, part), getattr(model, part)
    if (got is None) != (wanted is None):
        return ["one of the two models has a region decoder, the other none"]
    fields = [] if got is None else [field.name for field in dataclasses.fields(got)]
    replaced = not model.tower_pools and part == "image"
    free = {*_FREE, *_REPORTED, *(("pool", "projection") if replaced else ())}
    values = [(key, getattr(got, key), getattr(wanted, key)) for key in fields if key not in free]
    return [
        f"model.{part}.{key}: got {ours!r}, but the model there has {theirs!r}"
        for key, theirs, ours in values
        if theirs != ours
    ]


def _about_texts(stored: config_lib.TextTower, wanted: config_lib.TextTower) -> list[str]:
    """Lines for the keys of how texts are read that differ, and where the tower attends to its padding."""
    lines = [
        f"CHECK model.text.{key}: got {getattr(wanted, key)!r}; the model there has {getattr(stored, key)!r}"
        for key in _REPORTED
        if getattr(wanted, key) != getattr(stored, key)
    ]
    if not named.is_external(wanted.tower) and not wanted.packable:
        lines.append(
            "this tower attends to its padding: each text has a row of its own; model.text.mask_padding=True"
            " and text.packing=True train it on shared rows, which changes its function"
        )
    return lines


def _resize_positions(config: config_lib.Config, part: str, params: dict[str, np.ndarray]) -> list[str]:
    """Resizes the positions of a built-in tower to the model, in `params`; a line for the report, if any."""
    name, tower = f"{part}/position_embed", getattr(config.model, part)
    if name not in params or named.is_external(tower.tower):  # rotary ones follow the grid
        return []
    old = params[name]
    if part == "image":
        grid = tower.image_size // tower.patch_size
        if len(old) != tower.class_token + grid**2:
            params[name] = np.asarray(vit.resized_positions(jnp.asarray(old), int(tower.class_token), grid))
    else:
        params[name] = resize_text_positions(old, tower.context_length)
    same = len(params[name]) == len(old)
    return [] if same else [f"{len(old)} positions resized to {len(params[name])}"]


def _replace(params: Any, shardings: Any, loaded: dict[str, np.ndarray]) -> Any:
    """`params` with the arrays of `loaded` (by flat name) in their places and types, sharded."""

    def placed(path, leaf, sharding):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in loaded:
            return leaf
        array = loaded[name]
        return jax.make_array_from_callback(leaf.shape, sharding, lambda at: array[at].astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(placed, params, shardings)
