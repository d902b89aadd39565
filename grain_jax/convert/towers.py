"""Towers of other projects as ours: what the readers of their checkpoints share.

A reader gives each tower as a config and arrays under our names. Here they become a two-tower model, or
take the place of a training state's fresh towers, with every array accounted for.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from grain_jax import config as config_lib
from grain_jax import errors
from grain_jax.convert import parity
from grain_jax.convert import torch_names as names
from grain_jax.models import grain
from grain_jax.runtime import checkpoint

TOWERS = ("image", "text")
# What a tower's config says beside its function: where a fresh tower would start, and what may be resized.
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


class TowerError(errors.UserError):
    """A checkpoint's tower cannot be used; the message has one line a fault."""


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts `where` before each line of a TowerError that is raised inside."""
    try:
        yield
    except TowerError as error:
        lines = str(error).split("\n")
        raise TowerError("\n".join(where + line for line in lines)) from None


class Row(NamedTuple):
    """A parameter of ours and the entry, or the part of one, that it equals."""

    ours: str
    theirs: str  # "{}" is the layer
    form: names.Form = names.SAME
    part: tuple[int, int] = (0, 1)  # (which, of how many) that lie one under the other in the entry


class Tower(NamedTuple):
    """A tower as it was read."""

    config: config_lib.ImageTower | config_lib.TextTower
    params: dict[str, np.ndarray]  # our flat names ("image/blocks/norm_1/scale") -> float32
    theirs: dict[str, str]  # our flat names -> the checkpoint's
    assumed: tuple[str, ...]  # what the checkpoint does not say, in words
    prefix: str  # of the checkpoint's names that can only be this tower's


class Settings(NamedTuple):
    """What a checkpoint may not tell, by tower; None: read or assumed."""

    heads: Mapping[str, int | None] = {}
    activation: Mapping[str, str | None] = {}
    pad_id: int | None = None


def settled(what: str, given, stated):
    """The one of two values that is not None. Raises TowerError where they differ."""
    if None not in (given, stated) and given != stated:
        raise TowerError(f"{what}: got {given}, but the checkpoint says {stated}")
    return stated if given is None else given


def arrange(
    state: Mapping[str, np.ndarray], rows: Sequence[Row], depth: int, sizes: names.Sizes
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The entries of `rows` as our arrays, layers stacked, and each array's name in the checkpoint.

    Raises:
      TowerError: entries that are missing, not finite, or that cannot be laid out; a line each.
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
                part = np.asarray(row.form.ours(array, sizes), order="C")
                fits = row.form.theirs(part, sizes).shape == array.shape
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
    _raise(faults)
    return out, theirs


def side_of_grid(name: str, positions: int, class_token: bool) -> int:
    """The side of the square grid of so many positions; with a class token, it may have one of its own.

    Raises:
      TowerError: no square.
    """
    for extra in (0, 1) if class_token else (0,):
        side = math.isqrt(positions - extra)
        if side * side == positions - extra:
            return side
    raise TowerError(f"{name}: got {positions} positions, expected a square")


def with_class_position(positions: np.ndarray, grid: int, class_token: bool) -> np.ndarray:
    """Positions [grid * grid (+ 1), E] with a row for the class token, zero where it had none, as in big_vision."""
    missing = class_token and len(positions) == grid * grid
    return np.concatenate([np.zeros_like(positions[:1]), positions]) if missing else positions


def scalars(state: Mapping[str, np.ndarray], theirs: Mapping[str, str]) -> dict[str, np.ndarray]:
    """`logit_scale`, in log space, and `logit_bias` where there is one; float32 [].

    Args:
      state: the checkpoint's arrays.
      theirs: the names of the two there.

    Raises:
      TowerError: the scale is missing, or one is not a finite number.
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
    _raise(faults)
    return out


def two_tower_model(
    image: Tower, text: Tower, scalars: Mapping[str, np.ndarray]
) -> tuple[config_lib.Model, dict]:
    """The model of both towers and the scalars `logit_scale` (a logarithm) and maybe `logit_bias`.

    Raises:
      TowerError: arrays that the model lacks, does not have, or has in another shape; a line each.
    """
    width = {
        tower.params[f"{which}_projection/kernel"].shape[-1]
        if tower.config.projection != "none"
        else tower.config.width
        for which, tower in zip(TOWERS, (image, text))
    }
    if len(width) > 1:
        raise TowerError(f"the towers' embeddings have different widths, {sorted(width)}")
    bias = scalars.get("logit_bias")
    model = config_lib.Model(
        embed_dim=width.pop(),
        logit_scale_init=float(np.clip(np.exp(np.minimum(scalars["logit_scale"], 88)), 1, 100)),
        logit_bias_init=None if bias is None else float(bias),
        image=image.config,
        text=text.config,
        decoder=None,
    )
    try:
        model = config_lib.model_from_dict(dataclasses.asdict(model))
    except config_lib.ConfigError as error:
        raise TowerError(str(error)) from None
    found = {**image.params, **text.params, **scalars}
    check_shapes(found, grain.parameter_shapes(model), {**image.theirs, **text.theirs})
    params: dict = {}
    for name, array in found.items():
        names.put(params, name, array)
    return model, params


def check_shapes(
    found: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, str],
) -> None:
    """Raises TowerError, a line for each array that is missing, too much, or of another shape."""
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
    _raise(faults)


def differences(
    part: str,
    got: config_lib.ImageTower | config_lib.TextTower | config_lib.RegionDecoder,
    wanted,
    ignored: set[str],
) -> list[str]:
    """A line for each field in which a checkpoint's part is not the one that the config describes."""
    noun = "tower" if part in TOWERS else part
    return [
        f"model.{part}.{field.name}: got {getattr(wanted, field.name)!r}, but the checkpoint's {noun} has"
        f" {getattr(got, field.name)!r}"
        for field in dataclasses.fields(got)
        if field.name not in _NOT_COMPARED | ignored
        and getattr(got, field.name) != getattr(wanted, field.name)
    ]


def check_output(folder: epath.PathLike) -> epath.Path:
    """The folder to write a model to. Raises TowerError where something else is in it."""
    folder = epath.Path(folder)
    if folder.exists() and not (folder.is_dir() and (folder / "params").is_dir()):
        if not folder.is_dir() or any(folder.iterdir()):
            raise TowerError(f"{folder}: is in use by something else; expected a new folder")
    return folder


def save(
    folder: epath.Path, model: config_lib.Model, params: dict, source: str, found: parity.Report
) -> None:
    """Writes the model, with where it came from. Raises TowerError."""
    try:
        checkpoint.save_model(folder, model, params, source=source, parity=found.verdict)
    except OSError as error:
        raise TowerError(f"{folder}: cannot be written ({error})") from error


def describe(model: config_lib.Model, image: Tower, text: Tower) -> list[str]:
    """The report's lines about the towers and what of them was assumed."""
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


def _raise(faults: list[str]) -> None:
    if faults:
        raise TowerError("\n".join(faults))
