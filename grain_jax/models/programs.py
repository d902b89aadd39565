"""Which program computes the MLP of a tower, and whether its layers are a loop (for attention: attention.py)."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from grain_jax.config import ImageTower, TextTower
from grain_jax.core import errors
from grain_jax.models import placement

UNROLLED = 24  # layers without a loop, at most: the compile time grows with them

_apart: contextvars.ContextVar[bool] = contextvars.ContextVar("apart", default=False)


@contextlib.contextmanager
def maps_apart() -> Iterator[None]:
    """Inside, each dense map is a call of its own module, to which others can add; none shares a product or a kernel."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def are_apart() -> bool:
    """Whether this is inside `maps_apart`."""
    return _apart.get()


def of_mlp(
    program: str, dtype: np.dtype, tower: ImageTower | TextTower, *, length: int, remat: str
) -> str:
    """The program for the half of a layer that has the MLP: "xla" or "pallas" (mlp_kernel.py).

    "auto" takes the kernel in training on TPUs, in bfloat16, if all of these hold. The core's memory holds the weights
    of a layer, their gradients and a row. Nothing is computed again (`remat`): XLA leaves out the last product then, a
    kernel is computed whole. Weights are not cut over fsdp: a gather of the next layer does not run beside a kernel.

    Args:
      program: `model.mlp`.
      dtype: of the activations.
      tower: its sizes.
      length: L, tokens of a row.
      remat: what the backward pass keeps, "none" or a key of `layers.REMAT`.

    Raises:
      UserError: "pallas" of a gated MLP, with layer scale, LoRA or a tensor axis.
    """
    mesh = placement.mesh()
    cut = mesh is not None and mesh.shape.get("tensor", 1) > 1
    served = getattr(tower, "mlp", "plain") == "plain" and not getattr(tower, "layer_scale", False)
    served = served and not (cut or are_apart())
    if program == "pallas" and not served:
        raise errors.UserError(
            "model.mlp: got pallas with a gated MLP, layer scale, LoRA or mesh.tensor above 1, expected auto or xla"
        )
    if program != "auto":
        return program
    device = None if mesh is None else mesh.devices.flat[0]
    if device is None or device.platform != "tpu" or dtype != jnp.bfloat16:
        return "xla"
    from grain_jax.models import mlp_kernel  # a fifth of a second to import

    fits = mlp_kernel.fits(tower.width, tower.mlp_dim, length, device.device_kind)
    return "pallas" if served and fits and remat == "none" and not _gathers() else "xla"


def unrolled(tower: ImageTower | TextTower, remat: str, *programs: str) -> int:
    """`unroll` of `layers.scan_layers` for the layers of a tower whose parts have these programs.

    A loop copies the results that a kernel keeps for the backward pass into its stack and out again. The layers
    themselves cause less traffic with main memory (docs/performance.md). XLA's own programs write into the stack. With
    fsdp the loop stays: more gathers run beside work in it.
    """
    if tower.unroll:
        return tower.unroll
    has_kernel = not {"pallas", "cudnn"}.isdisjoint(programs)
    copies = remat == "none" and has_kernel and not _gathers()
    return tower.depth if copies and tower.depth <= UNROLLED else 1


def _gathers() -> bool:
    """Whether each layer gathers its weights over fsdp."""
    mesh = placement.mesh()
    return mesh is not None and mesh.shape.get("fsdp", 1) > 1
