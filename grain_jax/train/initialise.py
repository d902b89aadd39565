"""Initialisation from checkpoints: `init.image`, `init.text` and `init.decoder` name one for a part of the model.

Every array is accounted for: a missing one is an error, an unused one is reported. Positions are resized to the
sizes of the model.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.ndimage

from grain_jax import config as config_lib
from grain_jax.checkpoint import pretrained, saved_model
from grain_jax.checkpoint.pretrained import hub
from grain_jax.convert import huggingface, tables, towers
from grain_jax.convert.big_vision import checkpoint as big_vision
from grain_jax.convert.big_vision import towers as big_vision_towers
from grain_jax.convert.faults import ConvertError, prefixed, raise_any
from grain_jax.convert.open_clip import checkpoint as open_clip
from grain_jax.convert.open_clip import towers as open_clip_towers
from grain_jax.convert.tables import NamePair
from grain_jax.convert.towers import Tower
from grain_jax.core import named
from grain_jax.models import grain
from grain_jax.models import towers as built_in
from grain_jax.train import train_step

_KEPT_POSITIONS = 20  # see `resize_text_positions`
# Tower -> prefixes of its parameters, and of those that it has only in a model without a decoder.
_PREFIXES = {
    "image": (("image/",), ("image_pool/", "image_projection/")),
    "text": (("text/", "text_norm/", "text_pool/", "text_projection/"), ()),
}
_TOWERS = tuple(prefix for own, _ in _PREFIXES.values() for prefix in own)
_POOLING = ("pool", "projection")
_BOX_HEAD = ("box_head/", "box_projection/")


class Loaded(NamedTuple):
    """The arrays of the named parts, and a line for each thing to report about them."""

    params: dict[str, np.ndarray]  # our flat names -> float32
    report: list[str]


def state_of_step_0(
    config: config_lib.Config, program: train_step.Program, say: Callable[[str], None]
) -> train_step.TrainState:
    """The first state of a run: from its seed, with the parts that `config.init` names from their checkpoints.

    Args:
      config: of the run. Every process reads the checkpoints that it names.
      program: of the run.
      say: called with each line of the report.

    Raises:
      ConvertError: as `load`.
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


def resize_image_positions(
    positions: np.ndarray, grid: int, *, class_token: bool, method: str = "bilinear"
) -> np.ndarray:
    """Resizes the positions of a square grid to `grid` x `grid`; keeps the position of the class token.

    "bilinear" aligns the corners of the grids, as in big_vision (models/vit.py, resample_posemb); "bicubic" aligns
    their edges, with antialiasing, as in timm and open_clip.

    Args:
      positions: float32 [N, E], row by row; that of the class token is first.
      grid: patches a side of the result.
      class_token: whether `positions` has one for it.
      method: "bilinear" or "bicubic".
    """
    token, patches = positions[: int(class_token)], positions[int(class_token) :]
    old = round(len(patches) ** 0.5)
    if old != grid:
        square = patches.reshape(old, old, -1)
        if method == "bilinear":
            zoom = (grid / old, grid / old, 1)
            square = np.asarray(scipy.ndimage.zoom(square, zoom, order=1))
        else:
            wanted = (grid, grid, square.shape[2])
            square = np.asarray(jax.image.resize(square, wanted, "bicubic"))
        patches = square.reshape(grid * grid, -1)
    return np.concatenate([token, patches]).astype(np.float32)


def resize_text_positions(positions: np.ndarray, length: int) -> np.ndarray:
    """Resizes text positions [L, E] to another context length.

    A shorter context keeps the first positions. A longer one keeps the first 20, enough for most texts, and
    interpolates the rest linearly (Long-CLIP, Zhang et al. 2024).
    """
    old = len(positions)
    if length <= old:
        return positions[:length]
    kept = min(_KEPT_POSITIONS, old - 1)
    at = np.concatenate([np.arange(kept), np.linspace(kept, old - 1, length - kept)])
    low = np.minimum(at.astype(int), old - 2)
    share = (at - low)[:, None]
    stretched = (1 - share) * positions[low] + share * positions[low + 1]
    return stretched.astype(np.float32)


def check(init: config_lib.Init) -> None:
    """Raises ConvertError where a checkpoint that `init` names is not there; none is read, and the Hub is not asked."""
    for which in towers.TOWERS + ("decoder",):
        path = getattr(init, which)
        file = re.sub(r"(\.npz):[^/:].*$", r"\1", path or ".")  # without the sub-tree
        if not hub.is_reference(file) and not pretrained.folder_of(file).exists():
            raise ConvertError(
                f"init.{which}: {path}: no such file or folder, expected a checkpoint"
            )


def load(config: config_lib.Config) -> Loaded:
    """The arrays of the parts that `config.init` names, checked against `config.model`.

    Raises:
      ConvertError: a checkpoint cannot be read, its tower differs from the config, or arrays are missing; a
        line each.
    """
    shapes = grain.parameter_shapes(config.model)
    whole = Loaded({}, [])
    for part in (*towers.TOWERS, "decoder"):
        path = getattr(config.init, part)
        if path is not None:
            with prefixed(f"init.{part}: "):
                if part == "decoder":
                    loaded = _load_decoder(config, path, shapes)
                else:
                    loaded = _load_tower(config, part, path, shapes)
            whole = Loaded(whole.params | loaded.params, whole.report + loaded.report)
    return whole


def _load_decoder(config: config_lib.Config, path: str, shapes) -> Loaded:
    """The parameters of a checkpoint of ours that are not of its towers; those of a box head where both have the same."""
    model = config.model
    ours, flat = _read_ours(path)
    if ours.decoder is None and model.decoder is not None:
        raise ConvertError(f"{path}: has no region decoder; expected a run or checkpoint of GRAIN")
    if ours.decoder is not None and model.decoder is None:
        raise ConvertError(
            f"{path}: has a region decoder, but model.decoder is None; expected two towers of ours"
        )
    other = _TOWERS if ours.boxes == model.boxes else (*_TOWERS, *_BOX_HEAD)
    if model.decoder is None:
        other += _PREFIXES["image"][1]
    rest = lambda named: {name: x for name, x in named.items() if not name.startswith(other)}
    with prefixed(f"{path}: "):
        if model.decoder is not None:
            raise_any(towers.differences("decoder", ours.decoder, model.decoder))
        unknown = sorted(rest(flat).keys() - shapes.keys())
        raise_any([f"{name} is not part of the model" for name in unknown])
        found = tables.read([NamePair(name, name) for name in flat], flat, rest(shapes))
    return Loaded(found, [f"init.decoder: {len(found)} arrays from {path}"])


def _read_ours(path: str) -> tuple[config_lib.Model, dict[str, np.ndarray]]:
    """The model in a workdir, checkpoint or converted folder, and its arrays by flat name."""
    model, params, _ = saved_model.load_model(path)
    return model, {name: np.asarray(x, np.float32) for name, x in grain.flat(params).items()}


def _load_tower(config, which: str, path: str, shapes) -> Loaded:
    model = config.model
    tower, state = _read(model, which, path)
    wanted = getattr(model, which)
    ignored = _POOLING if which == "image" and model.decoder is not None else ()
    # The checkpoint's tower alone, with its pooling head and projection.
    alone = dataclasses.replace(
        model, decoder=None, boxes=config_lib.BoxHead(), **{which: tower.config}
    )
    of_tower = _own(which, alone, grain.parameter_shapes(alone))
    with prefixed(f"{path}: "):
        raise_any(towers.differences(which, tower.config, wanted, *ignored))
        # An unused entry of the tower itself would change its outputs.
        unknown = sorted(state.keys() - tables.used(tower.rows, of_tower))
        raise_any([f"{x}: unknown key" for x in unknown if x.startswith(tower.prefix)])
        own = _own(which, model, of_tower)
        missing = sorted(_own(which, model, shapes).keys() - own.keys())
        raise_any([f"{name}: missing" for name in missing])
        if which == "image":
            state = towers.completed(state, tower)
        params = tables.read(tower.rows, state, own)
    unused = sorted(state.keys() - tables.used(tower.rows, own))
    resized = _resize_positions(config, which, params)
    with prefixed(f"{path}: "):
        wrong = {name: x.shape for name, x in params.items() if x.shape != shapes[name]}
        raise_any([f"{n}: got shape {x}, expected {shapes[n]}" for n, x in wrong.items()])
    report = [f"init.{which}: {len(params)} arrays from {path}", *resized]
    report += [f"init.{which}: ASSUMED {words}" for words in tower.assumed]
    if which == "text":
        report += [
            f"init.text: CHECK model.text.{field}: got {getattr(wanted, field)!r}; such a tower's is"
            f" {getattr(tower.config, field)!r}"
            for field in ("cleaning", "pad_id", "end_id")
            if getattr(wanted, field) != getattr(tower.config, field)
        ]
        report += _of_padding(wanted, tower.config)
    if unused:
        report.append(f"init.{which}: not used: {', '.join(_in_short(unused, tower.prefix))}")
    return Loaded(params, report)


def _of_padding(wanted: config_lib.TextTower, stored: config_lib.TextTower) -> list[str]:
    """A line where the tower attends to its padding, in the run or in the checkpoint."""
    if wanted.mask_padding != stored.mask_padding:
        sees = "attends to its padding" if wanted.mask_padding else "masks its padding"
        return [
            f"init.text: model.text.mask_padding: got {wanted.mask_padding}; such a tower {sees}, so that its function is"
            " another one until it is trained"
        ]
    if named.is_external(wanted.tower) or wanted.packable:
        return []
    return [
        "init.text: this tower attends to its padding, so that each text has a row of its own;"
        " model.text.mask_padding=True and text.packing=True train it on shared rows, which changes its function"
    ]


def _resize_positions(
    config: config_lib.Config, which: str, params: dict[str, np.ndarray]
) -> list[str]:
    """Resizes the positions of a built-in tower to the model, in `params`; the line for the report, if any."""
    name, tower = f"{which}/position_embed", getattr(config.model, which)
    if named.is_external(tower.tower) or name not in params:  # rotary ones follow the grid
        return []
    old = params[name]
    if which == "image":
        grid = tower.image_size // tower.patch_size
        params[name] = resize_image_positions(
            old, grid, class_token=tower.class_token, method=config.init.resize
        )
    else:
        params[name] = resize_text_positions(old, tower.context_length)
    if len(params[name]) == len(old):
        return []
    return [f"init.{which}: {len(old)} positions resized to {len(params[name])}"]


def _in_short(names: list[str], prefix: str) -> list[str]:
    """Unused names for the report: those with the prefix of the tower one by one, other parts as a count."""
    parts: dict[str, list[str]] = {}
    for name in names:
        whole = name.startswith(prefix) or not re.search("[./]", name)
        parts.setdefault(name if whole else re.split("[./]", name)[0], []).append(name)
    return [
        found[0] if len(found) == 1 else f"{part} ({len(found)} arrays)"
        for part, found in sorted(parts.items())
    ]


def _own(which: str, model: config_lib.Model, named: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `named` (flat name -> value) that are parameters of that tower of `model`."""
    own, pooled = _PREFIXES[which]
    prefixes = own + (pooled if model.decoder is None else ())
    return {name: value for name, value in named.items() if name.startswith(prefixes)}


def _read(model: config_lib.Model, which: str, path: str) -> tuple[Tower, Mapping[str, np.ndarray]]:
    """The tower in a checkpoint of any format, and the arrays of the checkpoint."""
    wanted = getattr(model, which)
    settings = towers.Settings({which: wanted.heads}, {which: wanted.activation})
    folder = pretrained.folder_of(path)
    is_ours = any((folder / x).is_dir() for x in ("params", "checkpoints", "state"))
    if is_ours or huggingface.is_grain(folder):
        ours, flat = _read_ours(str(folder))
        return Tower(getattr(ours, which), [NamePair(x, x) for x in flat], f"{which}/"), flat
    if named.is_external(wanted.tower):
        raise ConvertError(
            f"model.{which}.tower: got {wanted.tower}, but only the built-in towers can start from {path}: the"
            f" image tower {', '.join(built_in.IMAGE)}, the text tower {', '.join(built_in.TEXT)}"
        )
    files, importers = open_clip, open_clip_towers
    if big_vision.is_path(path):
        files, importers = big_vision, big_vision_towers
    stored: Any = files.read(path)
    return importers.import_tower(which, stored, settings), stored.state


def _replace(params: Any, shardings: Any, loaded: dict[str, np.ndarray]) -> Any:
    """`params` with the arrays of `loaded` (by flat name) in their places, sharded as `shardings`."""

    def place(path, leaf, sharding):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in loaded:
            return leaf
        array = loaded[name]
        return jax.make_array_from_callback(leaf.shape, sharding, lambda at: array[at])

    return jax.tree_util.tree_map_with_path(place, params, shardings)
