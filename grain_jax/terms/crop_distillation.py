"""What the student says of a box is what a teacher says of the crop of that box (docs/method.md, Local terms)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from grain_jax import config as config_lib
from grain_jax.config import fields
from grain_jax.losses.local import LocalOutput, LocalTerm, PerImage, Seen
from grain_jax.models import box_head, layers, towers
from grain_jax.models.grain import normalize
from grain_jax.terms import views

SAMPLES = 8  # of RoIAlign along each side of a box


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of the term."""

    crops: int = fields.count(2, low=1, high=64)  # boxes an image and step
    # By what share of its sides the box is enlarged before the crop is cut; the student's box stays.
    margin: float = fields.key(0.0, low=0, high=4)
    # Smallest side of a box, as a share of the image.
    min_side: float = fields.key(0.05, low=0, high=1)
    map: bool = fields.key(True)  # whether the dense map is compared
    # Whether the embedding of the box head is compared, in a model that has one.
    box_head: bool = fields.key(True)


class CropDistillation(LocalTerm):
    """1 - cosine of the student's embedding of an annotated box and the teacher's of its crop, mean over the boxes.

    CLIPSelf (Wu et al., ICLR 2024, arXiv 2310.01403) with annotated boxes for its grid of patches. The student's is
    RoIAlign of its dense map, which is

    - of two towers, each patch pooled and projected alone;
    - with a decoder, the tokens, by a projection of the term's own; with a RoIAlign box head that is what the box head
      does, and its embedding counts for the map, unless `box_head` is off.

    The embedding of a box head is compared as well. For a teacher of another width than D the student's embeddings have
    projections of the term's own. A crop is stretched to the teacher's square; those of B images are float32
    [B, crops, S, S, 3].
    Measures `map_cosine` and `box_cosine`.
    """

    Options: ClassVar[type] = Options
    any_grid: ClassVar[bool] = True

    @classmethod
    def faults(cls, options: Any, config: config_lib.Config) -> list[str]:
        """Lines of a run whose teacher sees no crops, that has no boxes, or no embedding of them."""
        found, model, kind = [], config.model, config.teacher.kind
        if kind not in ("ema", "checkpoint"):
            found.append(f"teacher.kind: got {kind!r}, expected ema or checkpoint, which see crops")
        if not config.input.max_regions:
            found.append("input.max_regions: got 0, expected at least 1, for boxes")
        if options.map and towers.image_tower(model.image).pooled:
            got = (
                f"map: got True with model.image.tower={model.image.tower}, which pools its tokens"
            )
            found.append(f"{got}; expected map=False, or a tower with patches")
        if not (options.map or (options.box_head and model.boxes.kind != "none")):
            got = f"got False, with box_head={options.box_head} and model.boxes.kind={model.boxes.kind}"
            found.append(f"map: {got}, expected the map or a box head")
        return found

    def setup(self):
        model, width = self.model, (self.teacher_model or self.model).embed_dim
        has_head = self.options.box_head and model.boxes.kind != "none"
        of_head = has_head and model.decoder is not None and model.boxes.kind == "roi_align"
        self.has_head, self.has_map = has_head, self.options.map and not of_head

        sizes = {"embed": model.embed_dim, "width": model.image.width}
        project = lambda axis: layers.dense(
            width,
            (axis,),
            ("embed",),
            dtype=np.dtype(self.dtype),
            kernel_init=layers.normal(sizes[axis] ** -0.5),
            use_bias=False,
        )
        same = lambda x: x
        own_space, two_towers = model.embed_dim == width, model.decoder is None
        of_map = project("embed" if two_towers else "width")
        self.map_projection = same if own_space and two_towers else of_map
        self.box_projection = same if own_space else project("embed")

    def __call__(self, seen: Seen) -> LocalOutput:
        """The sum over the drawn boxes of each image, once for the map and once for the box head."""
        o, batch = self.options, seen.batch
        centre, side = jnp.split(batch.region_boxes_cxcywh, 2, axis=-1)
        usable = batch.region_mask & (side > 0).all(-1) & (side >= o.min_side).all(-1)
        slot, drawn = draw(seen.keys, usable, o.crops)  # [B, n]
        of_slot = lambda x: jnp.take_along_axis(x, slot[..., None], axis=1)
        boxes = of_slot(jnp.concatenate([centre - side / 2, centre + side / 2], axis=-1))
        target = self._target(seen, boxes)
        found = {}
        if self.has_map:
            found["map_cosine"] = self._of_map(seen, boxes)
        if self.has_head:
            embed = of_slot(seen.outputs.box_embed)
            found["box_cosine"] = self.box_projection(embed)
        total = count = jnp.zeros(len(drawn))
        measures = {}
        for name, embed in found.items():
            real = drawn & (embed != 0).any(-1)  # zeros: a box without a kept patch
            own = real.sum(1).astype(jnp.float32)
            cosine = jnp.sum(normalize(embed) * target, axis=-1)
            measures[name] = PerImage(jnp.where(real, cosine, 0).sum(1), own)
            total, count = total + jnp.where(real, 1 - cosine, 0).sum(1), count + own
        return LocalOutput(PerImage(total, count), measures)

    def _target(self, seen: Seen, boxes: jax.Array) -> jax.Array:
        """The teacher's embeddings of the crops, [B, n, Dt], of unit length."""
        config = self.teacher_model or self.model
        if self.is_initializing():
            return jnp.zeros((*boxes.shape[:2], config.embed_dim))
        grown = grow(boxes, self.options.margin)
        image = views.as_floats(seen.batch.image)
        size = config.image.image_size
        crops = views.crops(image, grown, (size, size))
        embed = seen.teacher.embed(crops.reshape(-1, *crops.shape[2:]))
        return jax.lax.stop_gradient(normalize(embed)).reshape(*boxes.shape[:2], -1)

    def _of_map(self, seen: Seen, boxes: jax.Array) -> jax.Array:
        """RoIAlign of the dense map, [B, n, Dt]."""
        if self.model.decoder is None:
            features = seen.student("patch_embeddings", seen.tokens, seen.places)
        else:
            features = seen.tokens[:, seen.leading :]
        found = box_head.of_patches(features, boxes, seen.places, bins=1, samples=SAMPLES)
        return self.map_projection(found[:, :, 0, 0])


def draw(keys: jax.Array, usable: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Different regions of each image, drawn alike among the usable ones.

    Args:
      keys: PRNG keys [B].
      usable: bool [B, R].
      count: n regions an image, or R where there are fewer.

    Returns:
      (slots int32 [B, n], whether they hold a usable region, bool [B, n]).
    """
    chance = jax.vmap(lambda key: jax.random.uniform(key, usable.shape[1:]))(keys)
    # Not top_k, for which XLA would gather the images of all devices.
    slot = jnp.argsort(jnp.where(usable, chance, -1), axis=1, descending=True)[:, :count]
    return slot, jnp.take_along_axis(usable, slot, axis=1)


def grow(boxes_xyxy: jax.Array, margin: float) -> jax.Array:
    """Boxes [..., 4] in [0, 1], enlarged by a share of their sides about their centres and cut to the image."""
    low, high = jnp.split(boxes_xyxy, 2, axis=-1)
    more = (high - low) * margin / 2
    return jnp.clip(jnp.concatenate([low - more, high + more], axis=-1), 0, 1)
