"""The similarities of images and captions of the batch are those of a teacher (docs/method.md, Local terms)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from grain_jax import config as config_lib
from grain_jax.config import fields
from grain_jax.losses import divergence
from grain_jax.losses.local import LocalOutput, LocalTerm, PerImage, Seen
from grain_jax.losses.shard import Mean, Shard, TermOutput
from grain_jax.losses.streaming import IdSet
from grain_jax.models.grain import normalize


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of the term."""

    # Temperature of the teacher's softmax; 0: that which the teacher was trained with.
    temperature: float = fields.key(0.0, low=0, high=100)
    learn_scale: bool = fields.key(True)  # whether the term trains the student's logit scale, too


class TeacherSimilarity(LocalTerm):
    """KL(teacher || student) of the softmax of each image over the captions and of each caption over the images.

    The term L_distill of MobileCLIP (Vasu et al., CVPR 2024, arXiv 2311.17049) with one teacher, that of CLIP-KD (Yang
    et al., CVPR 2024, arXiv 2307.12732): 1/2N of the sum over the N captions of both divergences. The teacher may have
    another width. The similarities stream over the devices (losses/divergence.py).
    Measures `image_to_caption` and `caption_to_image`, the mean divergence of the images and of the captions.
    """

    Options: ClassVar[type] = Options
    any_grid: ClassVar[bool] = True
    is_global: ClassVar[bool] = True

    @classmethod
    def faults(cls, options: Any, config: config_lib.Config) -> list[str]:
        """A line where the run has no teacher, or one with the student's towers."""
        del options
        kind, part = config.teacher.kind, config.teacher.part
        if kind == "none":
            return ["teacher.kind: got 'none', expected ema, checkpoint or embeddings"]
        if (kind, part) == ("ema", "heads"):
            return ["teacher.part: got 'heads', whose towers are the student's; expected 'all'"]
        return []

    def __call__(self, seen: Seen) -> LocalOutput:
        """Hands on the teacher's embeddings of images and captions, and the scale of its similarities."""
        zero = jnp.zeros(seen.outputs.image_embed.shape[0])
        loss = PerImage(zero, zero)
        if self.is_initializing():
            return LocalOutput(loss)
        teacher, options = seen.teacher, self.options
        scale = 1 / options.temperature if options.temperature else teacher.logit_scale
        handed = {
            "image": normalize(teacher.image_embed),
            "caption": normalize(teacher.text_embed),
        }
        handed, scale = jax.lax.stop_gradient((handed, jnp.asarray(scale, jnp.float32)))
        return LocalOutput(loss, handed=handed, shared={"scale": scale})

    @staticmethod
    def across(options: Any, shard: Shard, output: LocalOutput) -> TermOutput:
        """The mean over the captions of the global batch; see the class."""
        outputs, handed, ring = shard.outputs, output.handed, shard.layout.everywhere
        real, ids = shard.batch.caption_mask, shard.targets.caption_id  # [b, C]
        images, captions = real.shape
        first = images * jax.lax.axis_index(ring.names) if ring.names else 0
        number = first + jnp.arange(images, dtype=jnp.int32)
        flat = lambda x: x.reshape(images * captions, *x.shape[2:])
        rows = divergence.Side(
            flat(outputs.text_embed),
            flat(handed["caption"]),
            flat(ids),
            jnp.repeat(number, captions),
            flat(real),
        )
        columns = divergence.Side(
            outputs.image_embed, handed["image"], IdSet(ids, real), number, jnp.ones(images, bool)
        )
        scale = outputs.logit_scale
        if not options.learn_scale:
            scale = jax.lax.stop_gradient(scale)
        divergences: Any = divergence.divergences(
            shard.config.tile, ring, rows, columns, scale, output.shared["scale"]
        )
        of_captions, of_images = divergences[0].reshape(real.shape), divergences[1]
        both = jnp.where(real, (of_captions + of_images[:, None]) / 2, 0)
        own = real.any(1)

        def mean(value, mask):
            return Mean(jnp.where(mask, value, 0).sum(), mask.sum().astype(jnp.float32))

        measures = {
            "caption_to_image": mean(of_captions, real),
            "image_to_caption": mean(of_images, own),
        }
        return TermOutput(mean(both, real), measures)
