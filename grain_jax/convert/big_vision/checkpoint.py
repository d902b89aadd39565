"""Reading of big_vision's .npz: its arrays by the names of its current code, each layer of a transformer apart.

A path may name a sub-tree, `FILE.npz:img`, as in big_vision. Names and layouts that its loaders repair (models/vit.py,
models/proj/image_text/text_transformer.py at 0127fb6) are read too.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from grain_jax.convert import archives, tables
from grain_jax.convert.faults import ConvertError, prefixed
from grain_jax.core import regular_file

SCALARS = {"logit_scale": "t", "logit_bias": "b"}  # ours -> theirs
# Positions and the pooling head in older files; the second addend of positions.
_OLD_POSITIONS = re.compile(r"((?:img/|txt/)?)Transformer/(?:posembed_input/)?pos_embedding")
_OLD_HEAD = re.compile(
    r"((?:img/|txt/)?)((?:probe|MlpBlock_0|MultiHeadDotProductAttention_0|LayerNorm_0)(?:/.*)?)"
)
_ADDED = "Encoder_0/pos_embedding"


class Checkpoint(NamedTuple):
    """A path and its arrays."""

    path: str
    state: dict[str, np.ndarray]  # "img/Transformer/encoderblock_0/LayerNorm_0/scale" -> array


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
    with archives.reading(file, "a .npz of plain arrays"):
        arrays = archives.read_npz(file)
    # A training checkpoint holds the parameters under one of these, beside the state of the optimizer.
    for prefix in ("params/", "opt/target/"):
        if inside := _below(arrays, prefix):
            arrays = inside
            break
    if subtree:
        inside = _below(arrays, f"{subtree}/")
        if not inside:
            there = sorted({k.partition("/")[0] for k in arrays})
            raise ConvertError(f"{text}: no sub-tree {subtree!r}; there are: {', '.join(there)}")
        arrays = inside
    with prefixed(f"{file}: "):
        return Checkpoint(text, _current(arrays))


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _current(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays by current names; layers that scan stacked under `encoderblock` apart, as `encoderblock_0 ..`."""
    out: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        name = _OLD_POSITIONS.sub(r"\1pos_embedding", name)
        name = _OLD_HEAD.sub(r"\1MAPHead_0/\2", name) if _OLD_HEAD.fullmatch(name) else name
        before, stacked, after = name.partition("encoderblock/")
        if stacked and not (array.ndim and 0 < len(array) <= tables.MAX_LAYERS):
            raise ConvertError(
                f"{name}: got shape {array.shape}, expected 1 to {tables.MAX_LAYERS} layers"
            )
        layers = (
            {f"{before}encoderblock_{i}/{after}": x for i, x in enumerate(array)}
            if stacked
            else {name: array}
        )
        out |= layers
    for prefix in ("", "txt/"):  # old files add positions twice
        positions, added = f"{prefix}pos_embedding", f"{prefix}{_ADDED}"
        if positions in out and added in out and out[positions].shape == out[added].shape:
            out[positions] = out[positions] + out.pop(added)
    return out
