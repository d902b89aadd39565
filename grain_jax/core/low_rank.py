"""Low-rank factors beside a matrix (LoRA, Hu et al. 2021), and how they are folded into it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

A, B = "lora_a", "lora_b"  # beside the `kernel` of their map
_PARTS = {"kernel", A, B}


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
    """A tree of parameters with its factors folded into the matrices; all other arrays are those of `params`.

    Args:
      params: nested dict of arrays.
      scale: alpha / rank.
      fold: of one map.
    """
    if not isinstance(params, Mapping):
        return params
    if _PARTS <= params.keys():
        rest = {name: x for name, x in params.items() if name not in (A, B)}
        return rest | {"kernel": fold(params["kernel"], params[A], params[B], scale)}
    return {name: merged(x, scale, fold) for name, x in params.items()}


def maps_in(params: Any, path: str = "") -> Iterator[str]:
    """The names of the maps that have factors in a tree of parameters, such as "image/blocks/mlp/in"."""
    if isinstance(params, Mapping):
        if _PARTS <= params.keys():
            yield path
        for name, x in params.items():
            yield from maps_in(x, f"{path}/{name}" if path else name)
