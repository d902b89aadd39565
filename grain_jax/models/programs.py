"""Whether the layers of a tower are a loop, and whether its dense maps stand alone."""

import contextlib
import contextvars
from collections.abc import Iterator

from grain_jax.config import ImageTower, RegionDecoder, TextTower
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


def unrolled(tower: ImageTower | TextTower | RegionDecoder, remat: str, program: str) -> int:
    """`unroll` of `layers.scan_layers` for layers whose attention is computed by this program; cuDNN's stands for GPUs.

    A loop copies the results that a kernel keeps for the backward pass into its stack and out again. The layers
    themselves cause less traffic with main memory (docs/performance.md). XLA's own programs write into the stack. With
    fsdp the loop stays: more gathers run beside work in it.
    """
    if tower.unroll:
        return tower.unroll
    has_kernel = program in ("pallas", "cudnn")
    copies = remat == "none" and has_kernel and not _gathers()
    return tower.depth if copies and tower.depth <= UNROLLED else 1


def _gathers() -> bool:
    """Whether each layer gathers its weights over fsdp."""
    mesh = placement.mesh()
    return mesh is not None and mesh.shape.get("fsdp", 1) > 1
