"""Masked patches: the student learns the teacher's patches where its own are masked (docs/method.md, Local terms)."""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from grain_jax import config as config_lib
from grain_jax.config import fields
from grain_jax.core.schema import Patches
from grain_jax.losses.local import LocalOutput, LocalTerm, PerImage, Seen
from grain_jax.models import layers, places, towers
from grain_jax.models.places import Places
from grain_jax.terms import prototypes, views

TRIALS = 40  # blocks that are drawn for a mask
LEAST_PATCHES, LEAST_ASPECT = 4, 0.3  # of a block, as in iBOT and DINOv2


@dataclasses.dataclass(frozen=True)
class Options(prototypes.Options):
    """The keys of the term."""

    # The masked patches lie in rectangles ("block", BEiT and iBOT) or anywhere ("random").
    mask: str = fields.key("block", choices=("block", "random"))
    min_share: float = fields.key(
        0.1, low=0, high=1
    )  # smallest share of the patches that is masked
    max_share: float = fields.key(0.5, low=0.001, high=1)  # largest; each image draws its own
    # Whether visible patches are compared, too (TIPS v2).
    visible: bool = fields.key(False)

    def __post_init__(self):
        if self.min_share > self.max_share:
            raise ValueError(
                f"got min_share={self.min_share} and max_share={self.max_share}, expected the first to be the smaller"
            )


class MaskedPatches(LocalTerm):
    """iBOT (Zhou et al. 2022, arXiv 2111.07832), beside image and text as in TIPS (arXiv 2410.16512)."""

    Options: ClassVar[type] = Options
    any_grid: ClassVar[bool] = True

    @classmethod
    def faults(cls, options: Any, config: config_lib.Config) -> list[str]:
        """What it misses: an EMA teacher, patches that can be masked."""
        del options
        found, kind, tower = [], config.teacher.kind, towers.image_tower(config.model.image)
        if kind != "ema":
            found.append(f"teacher.kind: got {kind}, expected ema")
        if tower.pooled or not tower.maskable:
            got = f"model.image.tower: got {config.model.image.tower}"
            found.append(f"{got}, expected one with patches and maskable = True, such as vit")
        return found

    def setup(self):
        self.head = prototypes.Head(self.options, self.dtype)
        width = self.model.image.width
        self.mask_token = layers.parameter(self, "mask_token", layers.zeros, ("vector",), (width,))

    def __call__(self, seen: Seen) -> LocalOutput:
        """The sums of each image."""
        options: Options = self.options
        image = global_images(seen)
        of_teacher = seen.teacher.tokens(image)[:, seen.teacher.leading :]
        images, patches, _ = of_teacher.shape
        if isinstance(image, Patches):
            at = places.of_grid(image.grid, patches)
        else:
            at = places.of_square(images, math.isqrt(patches))
        chosen = jax.vmap(functools.partial(draw_mask, options))(at, seen.keys)
        of_student = seen.student(
            "image_tokens",
            views.normalised(image, self.model.image),
            masked=(chosen.mask, self.mask_token),
        )[:, seen.leading :]
        if options.visible:
            count = jnp.maximum(at.mask.sum(1, keepdims=True), 1)
            weight = at.mask / count.astype(jnp.float32)
        else:
            read = lambda x: jnp.take_along_axis(x, chosen.at[..., None], axis=1)
            of_student, of_teacher, weight = read(of_student), read(of_teacher), chosen.weight
        student = self.head(of_student)
        teacher = prototypes.of_teacher(self.head, seen.teacher.params_of_term, of_teacher)
        found = prototypes.compare(
            *(options, prototypes.Products(self.dtype), student, teacher, weight),
            *(seen.state["centre"], options.temperature(seen.share)),
        )
        count = jnp.ones(images)
        return LocalOutput(
            PerImage(found.loss, count),
            prototypes.measures(found, seen.state["usage"], count),
            statistics=prototypes.statistics(teacher, weight, found),
        )

    def initial_state(self) -> dict[str, jax.Array]:
        """The centre, and the mean of the teacher's distributions."""
        return prototypes.initial_state(self.options)

    def update(self, state, statistics) -> dict[str, jax.Array]:
        """The state after a step."""
        return prototypes.update(self.options, state, statistics)


def global_images(seen: Seen) -> jax.Array | Patches:
    """What student and teacher see, in [0, 1]: the global view, or without views the image itself.

    float32 [B, S, S, 3], or Patches of these.
    """
    if seen.views is None:
        return views.as_floats(seen.batch.image)
    return jax.tree.map(lambda x: x[:, 0], seen.views.global_view.image)


class Mask(NamedTuple):
    """The masked patches of an image, of P patches; those that are not real are none of them."""

    mask: jax.Array  # bool [P]
    at: jax.Array  # int32 [n], the masked patches first; n is the largest number that is masked
    weight: jax.Array  # float32 [n], of those at `at`: 1 / their number, 0 of the visible ones


def draw_mask(options: Options, at: Places, key: jax.Array) -> Mask:
    """A mask of an image whose patches lie at these places, [P] without an axis of images; a function of its key.

    The number of masked patches is drawn first. Blocks fill it as far as they fit; single patches fill the rest.
    """
    patches, real = len(at.mask), at.mask.sum()
    of_share, of_block, of_patch = jax.random.split(key, 3)
    share = jax.random.uniform(of_share, (), jnp.float32, options.min_share, options.max_share)
    count = jnp.clip(jnp.round(share * real).astype(jnp.int32), 1, real)
    order = jax.random.uniform(of_patch, (patches,))
    if options.mask == "block":
        order = order + _blocks(at, count, of_block)
    found = jnp.argsort(jnp.where(at.mask, -order, 1))
    first = jnp.arange(patches) < count
    most = min(patches, max(1, round(options.max_share * patches)))
    mask = jnp.zeros(patches, bool).at[found].set(first)
    return Mask(mask, found[:most], first[:most] / jnp.maximum(count, 1).astype(jnp.float32))


def _blocks(at: Places, count: jax.Array, key: jax.Array) -> jax.Array:
    """bool [P]: rectangles, drawn `TRIALS` times, that together cover `count` patches or fewer."""
    (row, column), (rows, columns) = at.yx.T, at.grid

    def draw(i, mask):
        area, aspect, top, left = jax.random.uniform(jax.random.fold_in(key, i), (4,))
        rest = (count - mask.sum()).astype(jnp.float32)
        area = LEAST_PATCHES + area * jnp.maximum(rest - LEAST_PATCHES, 0)
        aspect = jnp.exp((2 * aspect - 1) * math.log(1 / LEAST_ASPECT))
        height = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, rows)
        width = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, columns)
        top = jnp.floor(top * (rows - height + 1))
        left = jnp.floor(left * (columns - width + 1))
        block = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        joined = mask | (block & at.mask)
        return jnp.where(joined.sum() <= count, joined, mask)

    return jax.lax.fori_loop(0, TRIALS, draw, jnp.zeros(len(at.mask), bool))
