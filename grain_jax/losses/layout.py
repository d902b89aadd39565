"""How the images of a batch and their groups (`loss.group_size`) lie on the devices."""

from typing import NamedTuple

import jax

from grain_jax import config as config_lib
from grain_jax.core import errors

AXES = ("group", "member")  # mesh axes of the losses: groups side by side, and the devices of each


class GroupLayout(NamedTuple):
    """Where the images of a batch and of each group are.

    `everywhere` and `in_group` are axis names, as a collective such as `jax.lax.psum` takes them; () where no
    other device has such images.
    """

    sizes: tuple[int, int]  # of AXES
    everywhere: tuple[str, ...]  # the axes over all images
    in_group: tuple[str, ...]  # the axes over the images of a group
    groups_per_shard: int  # 1 or more; above 1 devices hold whole groups
    shards_per_group: int  # 1 or more; above 1 a group spans devices
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST  # of the products of float32

    def per_group(self, x):
        """[b, ...] of a shard -> [groups of the shard, images of the group, ...]."""
        groups = self.groups_per_shard
        return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def make_layout(images: int, config: config_lib.Loss, shards: int) -> GroupLayout:
    """The layout of `images` on so many shards. A group spans shards, or a shard holds whole groups.

    Raises:
      UserError: a group overlaps a part of a shard.
    """
    size, shard = config.group_size or images, images // shards
    if max(size, shard) % min(size, shard):
        whole = [n for n in config_lib.divisors(images) if n % shard == 0 or shard % n == 0]
        raise errors.UserError(
            f"loss.group_size: got {size}, expected a divisor or a multiple of the {shard} images that a"
            f" device has (batch_size {images} over data x fsdp = {shards}); set"
            f" {config_lib.flags_of('loss.group_size', whole, size)}"
        )
    per_group = max(1, size // shard)
    everywhere = AXES if shards > 1 else ()
    return GroupLayout(
        sizes=(shards // per_group, per_group),
        everywhere=everywhere,
        in_group=everywhere if per_group == shards else AXES[1:] if per_group > 1 else (),
        groups_per_shard=max(1, shard // size),
        shards_per_group=per_group,
    )
