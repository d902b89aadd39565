"""Low-rank factors beside a matrix (LoRA, Hu et al. 2021), and how they are folded into it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from grain_jax.core import errors

A, B = "lora_a", "lora_b"  # beside the `kernel` of their map


def fold(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """W + scale * A B, of the shape and type of `kernel`.

    Args:
      kernel: [layers, *in, *out].
      a: [layers, *in, rank].
      b: [layers, rank, *out].
      scale: alpha / rank.
    """
    layers, rank = a.shape[0], a.shape[-1]
    product = a.reshape(layers, -1, rank) @ b.reshape(layers, rank, -1)
    return kernel + scale * product.reshape(kernel.shape)


def merged(params: Any, scale: float, fold: Callable[..., Any] = fold) -> Any:
    """A tree of parameters with its factors folded into the matrices, and all arrays in float32.

    Args:
      params: nested dict of arrays.
      scale: alpha / rank.
      fold: of one map.

    Raises:
      UserError: factors that do not fit their matrix.
    """
    if not isinstance(params, Mapping):
        return params.astype(np.float32, copy=False)
    if _is_map(params):
        rest = {name: x.astype(np.float32, copy=False) for name, x in params.items() if name not in (A, B)}
        shapes = [np.shape(params.get(name, ())) for name in ("kernel", A, B)]
        kernel, a, b = shapes
        if len(b) < 3 or a[:-1] + b[2:] != kernel or b[:2] != a[:1] + a[-1:]:
            raise errors.UserError(
                f"kernel, {A}, {B}: got the shapes {', '.join(map(str, shapes))}, expected [layers, in, out],"
                " [layers, in, rank] and [layers, rank, out] of one map"
            )
        return rest | {"kernel": fold(rest["kernel"], params[A], params[B], scale)}
    return {name: merged(x, scale, fold) for name, x in params.items()}


def _is_map(params: Mapping) -> bool:
    """Whether a module has a factor: with one alone it is a map that lost the other."""
    return "kernel" in params and not params.keys().isdisjoint((A, B))


def maps_in(params: Any, path: str = "") -> Iterator[str]:
    """The names of the maps that have factors in a tree of parameters, such as "image/blocks/mlp/in"."""
    if isinstance(params, Mapping):
        if _is_map(params):
            yield path
        for name, x in params.items():
            yield from maps_in(x, f"{path}/{name}" if path else name)
