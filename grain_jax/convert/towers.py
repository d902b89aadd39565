"""Third-party towers: the parts that the importers of open_clip's and big_vision's checkpoints share.

An importer gives a `Tower`: a config and arrays under our names. Two of them become a two-tower model here;
`initialise` puts them into a training state. Every array of the checkpoint is accounted for.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from grain_jax import config as config_lib
from grain_jax.convert import layouts
from grain_jax.convert.faults import ConvertError, raise_any
from grain_jax.models import grain

TOWERS = ("image", "text")
Config = TypeVar("Config", config_lib.ImageTower, config_lib.TextTower)
T = TypeVar("T")
# Config fields that may differ from the checkpoint's: initialisation, speed, sizes that are resized, tokenizer.
_NOT_COMPARED = {
    "position_init",
    "position_period",
    "block_init",
    "unroll",
    "image_size",
    "context_length",
    "tokenizer",
    "cleaning",
    "pad_id",
}


class Row(NamedTuple):
    """A parameter of ours and the checkpoint's entry, or part of an entry, that holds it."""

    ours: str
    theirs: str  # "{}" is the layer
    layout: layouts.Layout = layouts.SAME
    part: tuple[int, int] = (0, 1)  # (index, number of parts that the entry stacks)


class Tower(NamedTuple, Generic[Config]):
    """A tower of a checkpoint."""

    config: Config
    params: dict[str, np.ndarray]  # our flat names ("image/blocks/norm_1/scale") -> float32
    theirs: dict[str, str]  # our flat names -> the checkpoint's
    assumed: tuple[str, ...]  # assumptions where the checkpoint is silent, for the report
    prefix: str  # of the checkpoint's names; names with it belong to this tower


class Settings(NamedTuple):
    """Values that a checkpoint may not hold, by tower; None: read or assumed."""

    heads: Mapping[str, int | None] = {}
    activation: Mapping[str, str | None] = {}
    pad_id: int | None = None


def settled(what: str, given: T | None, stated: T | None) -> T | None:
    """The one of two values that is not None. Raises ConvertError where both are given and differ."""
    if given is not None and stated is not None and given != stated:
        raise ConvertError(f"{what}: got {given}, but the checkpoint says {stated}")
    return stated if given is None else given


def arrange(
    state: Mapping[str, np.ndarray], rows: Sequence[Row], depth: int, sizes: layouts.Sizes
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The entries of `rows` as our arrays, layers stacked, and each array's name in the checkpoint.

    Raises:
      ConvertError: entries that are missing, not finite, or of a wrong shape; a line each.
    """
    out, theirs, faults = {}, {}, []
    for row in rows:
        layered = "{}" in row.theirs
        parts = []
        for name in [row.theirs.format(i) for i in range(depth)] if layered else [row.theirs]:
            if name not in state:
                faults.append(f"{name}: missing")
                continue
            array = np.asarray(state[name], np.float32)
            if not np.isfinite(array).all():
                faults.append(f"{name}: holds values that are not finite")
                continue
            which, count = row.part
            try:
                array = np.split(array, count)[which] if count > 1 else array
                part = np.asarray(row.layout.ours(array, sizes), order="C")
                fits = row.layout.theirs(part, sizes).shape == array.shape
            except (ValueError, IndexError):
                fits = False
            if fits:
                parts.append(part)
            else:
                faults.append(
                    f"{name}: got shape {state[name].shape}, which does not fit {row.ours}"
                )
        if len({part.shape for part in parts}) > 1:
            faults.append(f"{row.theirs}: layers of different shapes")
        elif parts:
            out[row.ours] = np.stack(parts) if layered else parts[0]
            theirs[row.ours] = row.theirs
    raise_any(faults)
    return out, theirs


def side_of_grid(name: str, positions: int, class_token: bool) -> int:
    """The side of the square grid of `positions`, which may include one for the class token.

    Raises:
      ConvertError: not a square.
    """
    for extra in (0, 1) if class_token else (0,):
        side = math.isqrt(positions - extra)
        if side * side == positions - extra:
            return side
    raise ConvertError(f"{name}: got {positions} positions, expected a square")


def with_class_position(positions: np.ndarray, grid: int, class_token: bool) -> np.ndarray:
    """Positions [grid * grid (+ 1), E] with a row for the class token: zeros where it is missing, as in big_vision."""
    missing = class_token and len(positions) == grid * grid
    return np.concatenate([np.zeros_like(positions[:1]), positions]) if missing else positions


def scalars(state: Mapping[str, np.ndarray], theirs: Mapping[str, str]) -> dict[str, np.ndarray]:
    """`logit_scale`, in log space, and `logit_bias` if the checkpoint has one; float32 [].

    Args:
      state: the checkpoint's arrays.
      theirs: our two names -> the checkpoint's.

    Raises:
      ConvertError: the scale is missing, or a value is not one finite number.
    """
    out, faults = {}, []
    for ours, name in theirs.items():
        if name in state:
            value = np.asarray(state[name], np.float32)
            if value.size != 1 or not np.isfinite(value).all():
                faults.append(f"{name}: got {value.tolist()}, expected one finite number ({ours})")
            else:
                out[ours] = value.reshape(())
        elif ours == "logit_scale":
            faults.append(f"{name}: missing; expected a model of two towers, with its {ours}")
    raise_any(faults)
    return out


def two_tower_model(
    image: Tower[config_lib.ImageTower],
    text: Tower[config_lib.TextTower],
    scalars: Mapping[str, np.ndarray],
) -> tuple[config_lib.Model, dict]:
    """The model of two towers, and its parameters as a nested dict.

    Raises:
      ConvertError: arrays that are missing, not part of the model, or of another shape; a line each.
      config.ConfigError: sizes that are no model's.
    """
    width = {
        tower.params[f"{which}_projection/kernel"].shape[-1]
        if tower.config.projection != "none"
        else tower.config.width
        for which, tower in zip(TOWERS, (image, text))
    }
    if len(width) > 1:
        raise ConvertError(f"the towers' embeddings have different widths, {sorted(width)}")
    bias = scalars.get("logit_bias")
    model = config_lib.Model(
        embed_dim=width.pop(),
        logit_scale_init=float(np.clip(np.exp(np.minimum(scalars["logit_scale"], 88)), 1, 100)),
        logit_bias_init=None if bias is None else float(bias),
        image=image.config,
        text=text.config,
        decoder=None,
    )
    model = config_lib.model_from_dict(dataclasses.asdict(model))
    found = {**image.params, **text.params, **scalars}
    check_shapes(found, grain.parameter_shapes(model), {**image.theirs, **text.theirs})
    params: dict = {}
    for name, array in found.items():
        layouts.put(params, name, array)
    return model, params


def check_shapes(
    found: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, str],
) -> None:
    """Raises ConvertError with a line for each array that is missing, unexpected, or of another shape."""
    faults = [f"{name}: missing" for name in sorted(expected.keys() - found.keys())]
    faults += [
        f"{theirs.get(name, name)}: {name} is not part of the model"
        for name in sorted(found.keys() - expected.keys())
    ]
    for name in sorted(found.keys() & expected.keys()):
        if found[name].shape != tuple(expected[name]):
            faults.append(
                f"{theirs.get(name, name)}: got {name} of shape {found[name].shape}, expected"
                f" {tuple(expected[name])}"
            )
    raise_any(faults)


def differences(
    part: str,
    got: config_lib.ImageTower | config_lib.TextTower | config_lib.RegionDecoder,
    wanted,
    ignored: set[str],
) -> list[str]:
    """A line for each field in which a checkpoint's tower or decoder differs from the config."""
    noun = "tower" if part in TOWERS else part
    return [
        f"model.{part}.{field.name}: got {getattr(wanted, field.name)!r}, but the checkpoint's {noun} has"
        f" {getattr(got, field.name)!r}"
        for field in dataclasses.fields(got)
        if field.name not in _NOT_COMPARED | ignored
        and getattr(got, field.name) != getattr(wanted, field.name)
    ]


def describe(
    model: config_lib.Model,
    image: Tower[config_lib.ImageTower],
    text: Tower[config_lib.TextTower],
) -> list[str]:
    """The lines of the report about two towers and the assumptions in them."""
    i, t = image.config, text.config
    lines = [
        f"image    {i.image_size} px, patch {i.patch_size}, width {i.width}, depth {i.depth}, heads"
        f" {i.heads}, MLP {i.mlp_dim} {i.activation}, pool {i.pool}, pre-norm {'yes' if i.pre_norm else 'no'},"
        f" norm epsilon {i.norm_eps:g}",
        f"text     vocabulary {t.vocab_size}, context {t.context_length}, width {t.width}, depth {t.depth},"
        f" heads {t.heads}, MLP {t.mlp_dim} {t.activation}, {'causal' if t.causal else 'bidirectional'},"
        f" pool {t.pool}, norm epsilon {t.norm_eps:g}",
        f"embedding {model.embed_dim}; no region decoder",
    ]
    for name, tower in zip(TOWERS, (image, text)):
        lines += [f"ASSUMED  {name}: {words}" for words in tower.assumed]
    return lines
