"""A loss term with a teacher: crops of an image learn what an averaged teacher says of the whole image.

The loss comes from DINO (Caron et al. 2021, arXiv 2104.14294) and SILC (Naeem et al. 2023, arXiv 2310.13355).
The teacher is the state of the term. It has averages over steps of the image tower and of the term's own
head, a running centre against a collapse, and the mean distribution.

    c.loss.terms.distillation = {"term": "examples.self_distillation.term:SelfDistillation", "weight": 1.0}

metrics.jsonl has it as `loss_distillation`, and `distillation/entropy`, of the teacher's distributions, and
`distillation/spread`, of their mean. All images alike to the teacher is a collapse: the two are equal.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from grain_jax.config import keys
from grain_jax.losses.local import LocalOutput, LocalTerm, Parameters, PerImage, Seen
from grain_jax.models import grain, layers, placement

TOWER = "image"  # the image tower among the parameters of the model


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of the term."""

    crops: int = keys.count(4, low=1, high=64)  # of an image
    crop_size: int = keys.size(32)  # pixels of a side, after resizing; a multiple of the patch size
    least_area: float = keys.key(0.1, low=0.001, high=1)  # of a crop, as a share of the image
    most_area: float = keys.key(0.4, low=0.001, high=1)  # of a crop, as a share of the image
    hidden: int = keys.size(256)  # units in the head
    bottleneck: int = keys.size(64)  # numbers that the prototypes are compared with
    prototypes: int = keys.count(256, low=2, high=2**20)  # classes of the distributions
    temperature: float = keys.key(0.1, low=0.01)  # of the crops
    teacher_temperature: float = keys.key(0.04, low=0.01)  # of the teacher
    decay: float = keys.key(0.99, low=0, high=1)  # of the averages that are the teacher
    centre_decay: float = keys.key(0.9, low=0, high=1)  # of the centre and of the mean distribution


class Head(nn.Module):
    """Vectors to their cosines with the prototypes."""

    options: Options
    dtype: np.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., E] -> float32 [..., K]."""
        o, init = self.options, layers.normal(x.shape[-1] ** -0.5)
        make = lambda size, start, end, name: layers.dense(
            size, (start,), (end,), dtype=self.dtype, kernel_init=init, name=name
        )
        x = nn.gelu(make(o.hidden, "width", "mlp", "hidden")(x))
        x = make(o.bottleneck, "mlp", "embed", "bottleneck")(x)
        shape = (o.prototypes, o.bottleneck)
        rows = layers.parameter(self, "prototypes", layers.normal(1.0), ("vocab", "embed"), shape)
        return jnp.einsum("...e,ke->...k", *(grain.normalize(y.astype(jnp.float32)) for y in (x, rows)))


class SelfDistillation(LocalTerm):
    """The cross-entropy of each crop's distribution over the prototypes with the teacher's."""

    Options: ClassVar[type] = Options

    @classmethod
    def faults(cls, options, config):
        """Crops that are no whole patches, or have no area."""
        faults = []
        if options.crop_size % config.model.image.patch_size:
            patch = config.model.image.patch_size
            faults.append(
                f"crop_size: got {options.crop_size}, expected a multiple of the patch size {patch}"
            )
        if options.least_area > options.most_area:
            got = f"least_area: got {options.least_area}"
            faults.append(f"{got}, expected at most most_area {options.most_area}")
        return faults

    def setup(self):
        """The trained head; the state has the teacher's."""
        self.head = Head(self.options, np.dtype(self.dtype))

    def __call__(self, seen: Seen) -> LocalOutput:
        """The sum over the crops of each image."""
        o, state = self.options, seen.state
        images, count = len(seen.keys), o.crops
        crops = jax.vmap(lambda image, key: random_crops(o, image, key))(seen.batch.image, seen.keys)
        crops = placement.by_batch(crops.reshape(images * count, *crops.shape[2:]))
        read = lambda tokens: tokens[:, seen.leading :].mean(1)  # the mean of the patches
        student = self.head(read(seen.apply("image_tokens", crops))).reshape(images, count, -1)
        tower = {TOWER: state["tower"]}
        whole = read(seen.apply("image_tokens", seen.batch.image, params=tower))
        if self.is_initializing():  # the state has no head yet
            teacher = self.head(whole)
        else:
            alone = Head(o, np.dtype(self.dtype), parent=None)
            teacher = alone.apply({"params": state["head"]}, whole)
        teacher = jax.lax.stop_gradient(teacher)
        target = jax.nn.softmax((teacher - state["centre"]) / o.teacher_temperature)
        said = jax.nn.log_softmax(student / o.temperature)
        ones = jnp.ones(images)
        of_images = lambda p, log: PerImage(-(p * log).sum(-1), ones)
        log = lambda p: jnp.log(jnp.maximum(p, 1e-20))
        return LocalOutput(
            PerImage(-(target[:, None] * said).sum((1, 2)), count * ones),
            measures={
                "entropy": of_images(target, log(target)),
                "spread": of_images(target, log(state["mean"])),
            },
            statistics={"logits": teacher.sum(0), "target": target.sum(0), "count": ones.sum()},
        )

    def initial_state(self, params: Parameters) -> dict[str, Any]:
        """The teacher of step 0 is the student."""
        copy = lambda tree: jax.tree.map(jnp.copy, tree)
        k = self.options.prototypes
        return {
            "tower": copy(params.model[TOWER]),
            "head": copy(params.term.get("head", {})),
            "centre": jnp.zeros(k),
            "mean": jnp.full(k, 1 / k),
        }

    def update(self, state, statistics, params: Parameters) -> dict[str, Any]:
        """The averages after a step."""
        average = lambda decay, old, new: jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)
        o, count = self.options, statistics["count"]
        return {
            "tower": average(o.decay, state["tower"], params.model[TOWER]),
            "head": average(o.decay, state["head"], params.term["head"]),
            "centre": average(o.centre_decay, state["centre"], statistics["logits"] / count),
            "mean": average(o.centre_decay, state["mean"], statistics["target"] / count),
        }


def random_crops(options: Options, image: jax.Array, key: jax.Array) -> jax.Array:
    """Squares of an image uint8 [S, S, 3], resized: uint8 [crops, crop_size, crop_size, 3]."""
    size, n = image.shape[0], options.crops
    keys = jax.random.split(key)
    area = jax.random.uniform(keys[0], (n,), minval=options.least_area, maxval=options.most_area)
    side = jnp.sqrt(area)  # as a share of the image's side
    corner = jax.random.uniform(keys[1], (n, 2)) * (1 - side[:, None]) * size

    def crop(corner, side):
        scale = options.crop_size / (side * size) * jnp.ones(2)
        shape = (options.crop_size, options.crop_size, 3)
        pixels = jax.image.scale_and_translate(
            image.astype(jnp.float32), shape, (0, 1), scale, -corner * scale, "linear"
        )
        return jnp.round(jnp.clip(pixels, 0, 255)).astype(jnp.uint8)

    return jax.vmap(crop)(corner, side)
