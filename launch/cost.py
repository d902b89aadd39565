"""The least time of a step on given chips, from the work of the compiled program: a roofline.

Assumptions; all but the second err on the fast side:

- Every unit runs at its printed peak. Pallas kernels take the time of their schedule (schedule.py).
- A collective runs as one ring over one axis of the torus. XLA can be faster over a whole torus, and slower
  over an axis that is not closed.
- Memory traffic and compute hide each other.
- A collective hides behind the work that the schedule puts between its start and its end. For the rest of its
  time it stops the chip.
- A transfer takes at least LATENCY_SECONDS.
"""

from collections.abc import Iterable
from typing import NamedTuple

from grain_jax.launch.chips import Chip
from grain_jax.launch.hlo_collectives import Collective

LATENCY_SECONDS = 1e-6  # of one transfer between neighbours


class Roofline(NamedTuple):
    """Seconds per step: of each resource alone, and together."""

    compute_s: float  # matrix products at peak, and kernels
    hbm_s: float  # traffic with main memory
    interconnect_s: float  # all collectives within slices or nodes, overlapped or not
    dcn_s: float  # the parts of collectives that leave a slice or node
    exposed_s: float  # collectives, as far as no work hides them
    bound: str  # the resource that takes longest
    step_s: float  # max(max(compute, HBM) + exposed, interconnect, network)


def roofline(flops: float, hbm_bytes: float, collectives: Iterable[Collective], chip: Chip) -> Roofline:
    """The roofline of one step.

    Args:
      flops: matrix products of one chip a step (`hlo_work.dot_flops`, with passes), at the bfloat16 peak.
      hbm_bytes: traffic of one chip with its memory a step (`hlo_work.bytes_accessed`).
      collectives: `hlo_collectives.collectives`; which of them leave a slice is in their `slices`.
      chip: what it runs on.
    """
    compute_s = flops / chip.bf16_flops
    hbm_s = hbm_bytes / chip.hbm_bytes_per_second
    interconnect_s = dcn_s = exposed_s = 0.0
    for collective in collectives:
        within, across = seconds(collective, chip)
        interconnect_s += within
        dcn_s += across
        work = collective.work
        beside = max(work.flops / chip.bf16_flops, work.bytes / chip.hbm_bytes_per_second)
        exposed_s += max(within + across - (beside if collective.overlapped else 0.0), 0.0)
    parts = {"compute": compute_s, "HBM": hbm_s, "interconnect": interconnect_s}
    parts["network between slices"] = dcn_s
    step_s = max(max(compute_s, hbm_s) + exposed_s, interconnect_s, dcn_s)
    return Roofline(*parts.values(), exposed_s, max(parts, key=parts.get), step_s)


def seconds(collective: Collective, chip: Chip) -> tuple[float, float]:
    """(within slices, between slices) of all runs of a collective.

    One that spans slices is taken apart as XLA and NCCL do: within every slice over all of the payload,
    between slices over each chip's share. A permutation between slices waits for the link between.
    """
    kind, slices = collective.kind, collective.slices
    within = across = 0.0
    local = max(1, collective.group_size // slices)
    if kind == "collective-permute":
        if slices > 1:
            across = collective.bytes / chip.dcn_bytes_per_second
        else:
            within = collective.bytes / collective.ways / chip.link_bytes_per_second
    else:
        within = collective.bytes * _share(kind, local) / chip.ici_bytes_per_second
        across = collective.bytes * _share(kind, slices) / local / chip.dcn_bytes_per_second
    least = collective.count * LATENCY_SECONDS
    return (max(within, least) if within else 0.0), (max(across, least) if across else 0.0)


def _share(kind: str, members: int) -> float:
    """How often a member of a ring sends the payload: its part once to each other, twice if it reduces."""
    return (2 if kind == "all-reduce" else 1) * (members - 1) / members
