"""How the images of a batch and their groups (`loss.group_size`) lie on the devices."""

from typing import NamedTuple

import jax
import numpy as np

from grain_jax import config as config_lib
from grain_jax.core import errors
from grain_jax.losses import hops
from grain_jax.losses.ring import Ring


class GroupLayout(NamedTuple):
    """Where the images of a batch and of each group are."""

    sizes: tuple[int, int, int]  # of the losses' mesh axes "group", "ring" and "gather"
    everywhere: Ring  # the ring over all images
    in_group: Ring  # the ring over the images of a group
    groups_per_shard: int  # 1 or more; above 1 devices hold whole groups
    shards_per_group: int  # 1 or more; above 1 a group spans devices

    def on(self, devices: np.ndarray, precision: str) -> "GroupLayout":
        """The layout with rings along the links of these devices, and with the precision of their products.

        Args:
          devices: [group, ring, gather, rest].
          precision: `loss.precision`; for TPUs alone: "high" would cut float32 to TF32 on a GPU.
        """
        # Rings of a group lie side by side along all other axes, rings of all images along gather and rest.
        in_group = np.moveaxis(devices, 1, -1).reshape(-1, devices.shape[1])
        everywhere = devices.reshape(-1, *devices.shape[2:])
        everywhere = np.moveaxis(everywhere, 0, -1).reshape(-1, len(everywhere))
        on_tpu = devices.flat[0].platform == "tpu"
        products = jax.lax.Precision(precision if on_tpu else "highest")
        placed = lambda ring, rings: ring._replace(path=hops.along_links(rings), precision=products)
        return self._replace(
            everywhere=placed(self.everywhere, everywhere), in_group=placed(self.in_group, in_group)
        )

    def per_group(self, x):
        """[b, ...] of a shard -> [groups of the shard, images of the group, ...]."""
        groups = self.groups_per_shard
        return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def make_layout(images: int, config: config_lib.Loss, shards: int) -> GroupLayout:
    """The layout of `images` on so many shards. A group spans shards, or a shard holds whole groups.

    Raises:
      UserError: a group overlaps a part of a shard, or `loss.gather` does not divide the shards of a group.
    """
    size, shard = config.group_size or images, images // shards
    faults = []
    if max(size, shard) % min(size, shard):
        whole = [n for n in config_lib.divisors(images) if n % shard == 0 or shard % n == 0]
        faults.append(
            f"loss.group_size: got {size}, expected a divisor or a multiple of the {shard} images that a"
            f" device has (batch_size {images} over data x fsdp = {shards}); set"
            f" {config_lib.flags_of('loss.group_size', whole, size)}"
        )
    per_group = max(1, size // shard)
    neighbours = per_group if per_group > 1 else shards
    if neighbours % config.gather:
        faults.append(
            f"loss.gather: got {config.gather}, expected a divisor of the {neighbours} devices that share"
            " negatives; set"
            f" {config_lib.flags_of('loss.gather', config_lib.divisors(neighbours), config.gather)}"
        )
    if faults:
        raise errors.UserError("\n".join(faults))
    gather = "gather" if config.gather > 1 else None
    ring = max(1, per_group // config.gather)
    sizes = shards // (ring * config.gather), ring, config.gather
    return GroupLayout(
        sizes,
        everywhere=Ring(("group", "ring"), sizes[0] * ring, gather) if shards > 1 else Ring(),
        in_group=Ring(("ring",), ring, gather) if per_group > 1 else Ring(),
        groups_per_shard=max(1, shard // size),
        shards_per_group=per_group,
    )
