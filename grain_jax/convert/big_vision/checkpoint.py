"""Reading of big_vision's .npz: its arrays by name, with the layers of a transformer stacked.

A path may name a sub-tree, `FILE.npz:img`, as in big_vision.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from grain_jax.convert import archives
from grain_jax.convert.faults import ConvertError
from grain_jax.convert.towers import Tower
from grain_jax.files import regular_file

SCALARS = {"logit_scale": "t", "logit_bias": "b"}  # ours -> theirs
_LAYERED = re.compile(r"(.*/)?encoderblock_(\d+)/(.*)")


class Checkpoint(NamedTuple):
    """A path and its arrays; layers are stacked, as under big_vision's scan."""

    path: str
    tree: dict[str, np.ndarray]  # "img/Transformer/encoderblock/LayerNorm_0/scale" -> array


def is_path(path: epath.PathLike) -> bool:
    """Whether a path names a .npz, with or without a sub-tree."""
    return bool(re.search(r"\.npz(:[^/:]+(/[^/:]+)*)?$", str(path)))


def read(path: epath.PathLike) -> Checkpoint:
    """`FILE.npz` or `FILE.npz:sub-tree` as float32 arrays.

    Raises:
      ConvertError: no such file, not a .npz of arrays, or no such sub-tree.
    """
    text = str(path)
    file, subtree = text, ""
    if (match := re.fullmatch(r"(.*\.npz):(.+)", text)) is not None:
        file, subtree = match.groups()
    file = epath.Path(file)
    if not regular_file.is_one(file):
        raise ConvertError(
            f"{file}: no such file; expected big_vision's .npz, or FILE.npz:sub-tree"
        )
    try:
        with archives.reading(file):
            arrays = archives.read_npz(file)
    except ConvertError:
        raise
    except Exception as error:  # a damaged zip may raise anything
        raise ConvertError(
            f"{file}: not a .npz of plain arrays ({type(error).__name__}: {str(error)[:120]})"
        ) from None
    # A training checkpoint holds the parameters under one of these, beside the state of the optimizer.
    for prefix in ("params/", "opt/target/"):
        if inside := below(arrays, prefix):
            arrays = inside
            break
    if subtree:
        inside = below(arrays, f"{subtree}/")
        if not inside:
            there = sorted({k.partition("/")[0] for k in arrays})
            raise ConvertError(f"{text}: no sub-tree {subtree!r}; there are: {', '.join(there)}")
        arrays = inside
    return Checkpoint(text, _stacked(arrays, text))


def below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _stacked(arrays: Mapping[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
    """The arrays with `encoderblock_0 ..` stacked on a first axis, as `encoderblock`."""
    out: dict[str, np.ndarray] = {}
    layers: dict[str, dict[int, np.ndarray]] = {}
    for name, array in arrays.items():
        match = _LAYERED.fullmatch(name)
        if match is None:
            out[name] = array
        else:
            whole = f"{match[1] or ''}encoderblock/{match[3]}"
            layers.setdefault(whole, {})[int(match[2])] = array
    for name, parts in layers.items():
        shapes = {part.shape for part in parts.values()}
        if sorted(parts) != list(range(len(parts))) or len(shapes) > 1:
            raise ConvertError(
                f"{path}: {name}: got layers {sorted(parts)} of shapes {sorted(shapes)}, expected"
                " 0, 1, ... of one shape"
            )
        out[name] = np.stack([parts[i] for i in range(len(parts))])
    return out


def unused(checkpoint: Checkpoint, *used: Tower) -> list[str]:
    """The entries that are in none of these towers, sorted."""
    return sorted(checkpoint.tree.keys() - {n for u in used for n in u.theirs.values()})
