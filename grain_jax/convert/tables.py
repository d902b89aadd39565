"""Tables of names: for each of our parameters, the array of another library's checkpoint and its layout.

A table is a sequence of rows; `read` makes our parameters of the entries, `write` the entries of our
parameters. `formats` has the tables of PyTorch's packages.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from grain_jax.convert.faults import raise_any

MAX_LAYERS = 1000
Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray]  # of a checkpoint, by its names; or ours, by "image/norm/scale"


class ArrayLayout(NamedTuple):
    """How an entry holds a parameter: with its axes in another order, and ours maybe merged."""

    shape: Callable[[Shape], Shape]  # of the entry, from ours
    axes: Shape = ()  # the entry's axes in our order; (): unchanged


def _side(shape: Shape) -> int:
    """p of our patches [p * p * 3, E]."""
    return math.isqrt(shape[0] // 3)


# Theirs <- ours.
SAME = ArrayLayout(lambda s: s)
THREE_AXES = ArrayLayout(lambda s: (1,) * (3 - len(s)) + s)
LINEAR = ArrayLayout(lambda s: s[::-1], (1, 0))
HEADS_IN = ArrayLayout(lambda s: (s[1] * s[2], s[0]), (1, 0))  # [K h, E] <- [E, K, h]
HEADS_BIAS = ArrayLayout(lambda s: (s[0] * s[1],))  # [K h] <- [K, h]
HEADS_OUT = ArrayLayout(lambda s: (s[2], s[0] * s[1]), (1, 0))  # [E, K h] <- [K, h, E]
PATCHES = ArrayLayout(lambda s: (s[1], 3, _side(s), _side(s)), (2, 3, 1, 0))  # [E, 3, p, p]
PATCHES_LAST = ArrayLayout(lambda s: (_side(s), _side(s), 3, s[1]))  # [p, p, 3, E], of Flax


class NamePair(NamedTuple):
    """One of our parameters, and the entry (or part of an entry) that holds it."""

    ours: str
    theirs: str  # "{}" is the layer; ours are stacked over layers on the first axis
    layout: ArrayLayout = SAME
    part: tuple[int, int] = (0, 1)  # (index, number of parts that the entry stacks on its axis 0)

    def entries(self, shape: Shape) -> list[str]:
        """The names of the entries of a parameter of `shape`, one per layer."""
        return [self.theirs.format(i) for i in range(shape[0])] if self.layered else [self.theirs]

    @property
    def layered(self) -> bool:
        """Whether there is an entry for each layer."""
        return "{}" in self.theirs


def read(
    rows: Iterable[NamePair],
    state: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    unused: Collection[str] | None = None,
) -> Arrays:
    """Our parameters, float32, of the rows whose parameter is in `shapes`.

    Args:
      rows: the table.
      state: the checkpoint's arrays.
      shapes: our name -> shape, as `grain.parameter_shapes` gives for a model.
      unused: entries that no parameter needs; None: any.

    Raises:
      ConvertError: entries that are missing, not finite or of another shape, or that nothing needs,
        parameters without a row.
    """
    out: Arrays = {}
    faults, known = [], set(state if unused is None else unused)
    rows = [row for row in rows if row.ours in shapes]
    for row in rows:
        shape = shapes[row.ours]
        of_layer = shape[1:] if row.layered else shape
        index, count = row.part
        expected = row.layout.shape(of_layer)
        whole = (count * expected[0], *expected[1:]) if count > 1 else expected
        parts, names = [], row.entries(shape)
        known.update(names)
        for name in names:
            array = state.get(name)
            if array is None:
                faults.append(f"{name}: missing")
            elif array.shape != whole:
                faults.append(f"{name}: got shape {array.shape}, expected {whole}")
            elif not np.isfinite(array).all():
                faults.append(f"{name}: holds values that are not finite")
            else:
                part = np.split(array, count)[index] if count > 1 else np.asarray(array)
                part = part.transpose(row.layout.axes or range(part.ndim)).reshape(of_layer)
                parts.append(np.asarray(part, np.float32, order="C"))
        if not faults:
            out[row.ours] = np.stack(parts) if row.layered else parts[0]
    faults += [f"{name}: missing" for name in sorted(shapes.keys() - {row.ours for row in rows})]
    faults += [f"{name}: unknown key, shape {state[name].shape}" for name in sorted(state.keys() - known)]
    raise_any(list(dict.fromkeys(faults)))
    return out


def write(rows: Iterable[NamePair], params: Mapping[str, Any]) -> Arrays:
    """The entries that hold our parameters (or their gradients); the inverse of `read`.

    Raises:
      ValueError: a parameter without a row.
    """
    by_name = {row.ours: row for row in rows}
    if lost := params.keys() - by_name.keys():
        raise ValueError(f"parameters without a name in the format: {', '.join(sorted(lost))}")
    out: dict[str, list[np.ndarray]] = {}
    for row in (row for name, row in by_name.items() if name in params):
        array = np.asarray(params[row.ours])
        for name, layer in zip(row.entries(array.shape), array if row.layered else [array]):
            shape = row.layout.shape(layer.shape)
            axes = row.layout.axes or tuple(range(len(shape)))
            layer = layer.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))
            out.setdefault(name, []).append(layer)
    return {
        name: np.asarray(x[0] if len(x) == 1 else np.concatenate(x), order="C") for name, x in out.items()
    }


def nested(params: Mapping[str, Any]) -> dict:
    """Parameters by "image/norm/scale" as a nested dict."""
    return traverse_util.unflatten_dict(params, sep="/")


class Entries:
    """The entries of a checkpoint under our names, to read sizes off their shapes."""

    def __init__(self, state: Mapping[str, np.ndarray], rows: Sequence[NamePair]):
        self._state, self._rows = state, {row.ours: row for row in rows}

    def name(self, ours: str) -> str:
        """The name of the (first layer's) entry; "" where the format has none."""
        return self._rows[ours].theirs.format(0) if ours in self._rows else ""

    def __contains__(self, ours: str) -> bool:
        return self.name(ours) in self._state

    def shape(self, ours: str, *axes: int) -> Shape:
        """The entry's shape. Raises ConvertError: it is missing, empty, or has another number of axes."""
        name = self.name(ours)
        if ours not in self:
            raise_any([f"{name}: missing"])
        shape = self._state[name].shape
        if len(shape) not in axes or 0 in shape:
            expected = " or ".join(map(str, axes))
            raise_any([f"{name}: got shape {shape}, expected {expected} axes"])
        return shape

    def depth(self, ours: str) -> int:
        """The number of layers; one after a gap counts, too. Raises ConvertError where there is none."""
        before, after = self._rows[ours].theirs.split("{}")
        layer = re.compile(re.escape(before) + r"(\d{1,9})" + re.escape(after[0]))
        layers = [int(match[1]) for match in map(layer.match, self._state) if match]
        if not layers or max(layers) > MAX_LAYERS:
            raise_any([f"{before}0: no such layer"])
        return 1 + max(layers)


# The same function in the arrays that another format has: our flat parameters before their names change.


def without_patch_bias(flat: Arrays) -> Arrays:
    """The bias of the patches as part of their positions, of a tower with a class token."""
    flat = dict(flat)
    bias = flat.pop("image/patch_embed/bias", None)
    if bias is not None:
        positions = np.array(flat["image/position_embed"])
        positions[1:] += bias
        flat["image/position_embed"] = positions
    return flat


def with_patch_bias(flat: Arrays) -> Arrays:
    """A bias of zeros where the patches have none."""
    width = flat["image/patch_embed/kernel"].shape[1]
    return {"image/patch_embed/bias": np.zeros(width, np.float32), **flat}


def with_projection(flat: Arrays, tower: str, width: int, *, bias: bool) -> Arrays:
    """The identity if a tower of that width has no projection and, with `bias`, zeros if it has no bias."""
    name = f"{tower}_projection"
    kernel = flat.get(f"{name}/kernel", np.eye(width, dtype=np.float32))
    zeros = {f"{name}/bias": np.zeros(kernel.shape[1], np.float32)} if bias else {}
    return {**zeros, **flat, f"{name}/kernel": kernel}


def without_class_position(flat: Arrays) -> Arrays:
    """The position of the class token as part of the token."""
    if "image/class_token" not in flat:
        return flat
    positions = flat["image/position_embed"]
    token = flat["image/class_token"] + positions[0]
    return {**flat, "image/class_token": token, "image/position_embed": positions[1:]}
