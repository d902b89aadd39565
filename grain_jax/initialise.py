"""Towers that start from a checkpoint (`init.image`, `init.text`) instead of from the seed.

Every array is accounted for: what the model wants and the checkpoint lacks is an error, what the
checkpoint has and the model does not take is named. Positions are resized to the model's.
"""

import re
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.ndimage
from etils import epath

from grain_jax import checkpoint
from grain_jax import config as config_lib
from grain_jax.convert import big_vision, open_clip, towers
from grain_jax.convert.towers import Tower, TowerError

_KEPT_POSITIONS = 20  # of a text; see `resize_text_positions`
# The parameters of each tower; those of the second line only where no decoder takes their place.
_PREFIXES = {
    "image": (("image/",), ("image_pool/", "image_projection/")),
    "text": (("text/", "text_norm/", "text_pool/", "text_projection/"), ()),
}


class Loaded(NamedTuple):
    """The arrays of towers, and what to say about them."""

    params: dict[str, np.ndarray]  # our flat names -> float32
    report: list[str]


def resize_image_positions(
    positions: np.ndarray, grid: int, *, class_token: bool, method: str = "bilinear"
) -> np.ndarray:
    """Positions [N, E] of a square grid as those of a grid of `grid` x `grid`; the class token's stays.

    "bilinear" lays the grids' corners on each other, as big_vision does (models/vit.py,
    resample_posemb); "bicubic" their edges, with antialiasing, as timm and open_clip do.

    Args:
      positions: float32 [N, E], row by row, the class token's first.
      grid: patches a side that are wanted.
      class_token: whether there is one.
      method: "bilinear" or "bicubic".
    """
    token, patches = positions[: int(class_token)], positions[int(class_token) :]
    old = round(len(patches) ** 0.5)
    if old != grid:
        square = patches.reshape(old, old, -1)
        if method == "bilinear":
            square = scipy.ndimage.zoom(square, (grid / old, grid / old, 1), order=1)
        else:
            square = np.asarray(jax.image.resize(square, (grid, grid, square.shape[2]), "bicubic"))
        patches = square.reshape(grid * grid, -1)
    return np.concatenate([token, patches]).astype(np.float32)


def resize_text_positions(positions: np.ndarray, length: int) -> np.ndarray:
    """Positions [L, E] of texts for another context length, first and last kept.

    A shorter context keeps the first ones. A longer one keeps the first 20, within which most texts
    end, and stretches the rest linearly (Long-CLIP, Zhang et al. 2024).
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


def load(config: config_lib.Config, shapes: dict[str, tuple[int, ...]]) -> Loaded:
    """The arrays of the towers that `config.init` names.

    Args:
      config: `init` and `model` are used.
      shapes: our flat parameter names -> the shapes that the model has.

    Raises:
      TowerError: a checkpoint cannot be read, has another tower than the config, or lacks arrays.
    """
    params: dict[str, np.ndarray] = {}
    report: list[str] = []
    for which in towers.TOWERS:
        path = getattr(config.init, which)
        if path is None:
            continue
        try:
            loaded = _load_tower(config, which, path, shapes)
        except TowerError as error:
            lines = str(error).split("\n")
            raise TowerError("\n".join(f"init.{which}: {line}" for line in lines)) from None
        params |= loaded.params
        report += loaded.report
    return Loaded(params, report)


def _load_tower(config, which: str, path: str, shapes) -> Loaded:
    model = config.model
    tower, unused = _read(model, which, path)
    wanted = getattr(model, which)
    ignored = {"pool", "projection"} if which == "image" and model.decoder is not None else set()
    faults = towers.differences(which, tower.config, wanted, ignored)
    if faults:
        raise TowerError("\n".join(f"{path}: {fault}" for fault in faults))
    own, pooled = _PREFIXES[which]
    prefixes = own + (pooled if model.decoder is None else ())
    expected = {name: shape for name, shape in shapes.items() if name.startswith(prefixes)}
    params = {name: x for name, x in tower.params.items() if name.startswith(prefixes)}
    unused = unused + [tower.theirs[name] for name in tower.params if name not in params]
    position = f"{which}/position_embed"
    old = params[position].shape[0]
    if which == "image":
        params[position] = resize_image_positions(
            params[position],
            wanted.image_size // wanted.patch_size,
            class_token=wanted.class_token,
            method=config.init.resize,
        )
    else:
        params[position] = resize_text_positions(params[position], wanted.context_length)
    towers.check_shapes(params, expected, tower.theirs)
    report = [f"init.{which}: {len(params)} arrays from {path}"]
    if len(params[position]) != old:
        report.append(f"init.{which}: {old} positions resized to {len(params[position])}")
    report += [f"init.{which}: ASSUMED {words}" for words in tower.assumed]
    if unused:
        layers_as_one = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in unused})
        report.append(f"init.{which}: not used: {', '.join(layers_as_one)}")
    return Loaded(params, report)


def _read(model: config_lib.Model, which: str, path: str) -> tuple[Tower, list[str]]:
    """The tower in a checkpoint of any kind, and the checkpoint's entries that are not part of it."""
    wanted = getattr(model, which)
    settings = towers.Settings(
        heads={which: wanted.heads}, activation={which: wanted.activation}, pad_id=None
    )
    if big_vision.is_path(path):
        stored = big_vision.read(path)
        tower = big_vision.import_tower(stored, which, settings)
        return tower, big_vision.unused(stored, tower)
    folder = epath.Path(path)
    if folder.is_dir() and any((folder / x).is_dir() for x in ("params", "checkpoints", "state")):
        try:
            ours, params, _ = checkpoint.load_model(folder)
        except checkpoint.CheckpointError as error:
            raise TowerError(str(error)) from None
        flat = {name: np.asarray(x, np.float32) for name, x in towers.flat(params).items()}
        own, pooled = _PREFIXES[which]
        prefixes = own + (pooled if ours.decoder is None else ())
        params = {name: x for name, x in flat.items() if name.startswith(prefixes)}
        return Tower(getattr(ours, which), params, {name: name for name in params}, ()), sorted(
            flat.keys() - params.keys()
        )
    stored = open_clip.read(path)
    tower = open_clip.import_tower(stored, which, settings)
    return tower, open_clip.unused(stored, tower)


def replace(params: Any, shardings: Any, loaded: dict[str, np.ndarray]) -> Any:
    """`params` with the loaded arrays in their places, laid out as `shardings` says.

    Args:
      params: a parameter tree on the devices.
      shardings: the same tree of NamedShardings.
      loaded: our flat names -> arrays.
    """

    def place(path, leaf, sharding):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in loaded:
            return leaf
        array = loaded[name]
        return jax.make_array_from_callback(leaf.shape, sharding, lambda at: array[at])

    return jax.tree_util.tree_map_with_path(place, params, shardings)
