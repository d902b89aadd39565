"""Self-distillation: local views of the student learn the teacher's view of the whole image (docs/method.md, Local terms)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from grain_jax import config as config_lib
from grain_jax.config import fields
from grain_jax.core.schema import Patches
from grain_jax.losses.local import LocalOutput, LocalTerm, PerImage, Seen
from grain_jax.losses.shard import Mean, Shard, TermOutput
from grain_jax.models import places, towers
from grain_jax.terms import prototypes, views


@dataclasses.dataclass(frozen=True)
class Options(prototypes.Options):
    """The keys of the term."""

    # What the head reads: the image "embedding", which with a decoder is that of the image query; the "class" token; or
    # the "mean" of the patches.
    reads: str = fields.key("embedding", choices=("embedding", "class", "mean"))
    # Against a collapse: a running "centre" (DINO), or "sinkhorn" over the global batch (SwAV, DINOv2).
    centring: str = fields.key("centre", choices=("centre", "sinkhorn"))
    iterations: int = fields.count(3, low=1, high=100)  # of centring=sinkhorn
    # Whether the image of the batch is one of the student's views, too; DINO compares its other global view.
    image: bool = fields.key(False)


class SelfDistillation(LocalTerm):
    """SILC (Naeem et al. 2023, arXiv 2310.13355), whose loss is that of DINO (Caron et al. 2021)."""

    Options: ClassVar[type] = Options
    any_grid: ClassVar[bool] = True
    is_global: ClassVar[bool] = True

    @classmethod
    def faults(cls, options: Any, config: config_lib.Config) -> list[str]:
        """What it misses: an EMA teacher, local views, the tokens that it reads."""
        found = []
        if config.teacher.kind != "ema":
            found.append(f"teacher.kind: got {config.teacher.kind}, expected ema")
        if not config.input.views.local:
            found.append("input.views.local: got 0, expected 1 or more")
        tower = config.model.image.tower
        if options.reads != "embedding" and towers.image_tower(config.model.image).pooled:
            got = (
                f"reads: got {options.reads} with model.image.tower={tower}, which pools its tokens"
            )
            found.append(f"{got}; expected reads=embedding, or a tower with patches")
        elif options.reads == "class" and not config.model.image.class_token:
            found.append("model.image.class_token: got False, expected True with reads=class")
        return found

    def setup(self):
        self.head = prototypes.Head(self.options, self.dtype)

    def __call__(self, seen: Seen) -> LocalOutput:
        """The sums of each image; with centring=sinkhorn what `across` needs."""
        options: Options = self.options
        student = self.head(self._student(seen))
        whole = self._teacher(seen)
        teacher = prototypes.of_teacher(self.head, seen.teacher.params_of_term, whole)
        images, n, _ = student.rows.shape
        temperature = options.temperature(seen.share)
        count = jnp.ones(images)
        if options.centring == "sinkhorn":
            return LocalOutput(
                PerImage(jnp.zeros(images), count),
                # In the type of the activations, which says how `across` multiplies them.
                handed={
                    "student": student.rows.astype(self.dtype),
                    "teacher": teacher.rows.astype(self.dtype),
                },
                shared={
                    "student_prototypes": student.prototypes,
                    "teacher_prototypes": teacher.prototypes,
                    "temperature": temperature,
                },
            )
        teacher = teacher._replace(rows=jnp.broadcast_to(teacher.rows, student.rows.shape))
        weight = jnp.full((images, n), 1 / n)
        found = prototypes.compare(
            *(options, prototypes.Products(self.dtype), student, teacher, weight),
            *(seen.state["centre"], temperature),
        )
        return LocalOutput(
            PerImage(found.loss, count),
            prototypes.measures(found, seen.state["usage"], count),
            statistics=prototypes.statistics(teacher, weight, found),
        )

    @staticmethod
    def across(options: Any, shard: Shard, output: LocalOutput) -> TermOutput:
        """The loss over the global batch; with centring=centre the sum of that of each image."""
        if options.centring == "centre":
            return TermOutput(Mean(output.loss.sum.sum(), output.loss.count.sum()), {})
        handed, shared, ring = output.handed, output.shared, shard.layout.everywhere
        products = prototypes.Products(handed["student"].dtype.name, ring.precision)
        temperature = jax.lax.stop_gradient(shared["temperature"])
        rows, its = handed["student"], shared["teacher_prototypes"]
        centre = prototypes.sinkhorn_centre(
            prototypes.Embedded(handed["teacher"][:, 0], its),
            temperature,
            iterations=options.iterations,
            names=ring.names,
            products=products,
            tile=options.tile,
        )
        images, n, _ = rows.shape
        found = prototypes.compare_here(
            *(options, products, rows, shared["student_prototypes"]),
            *(jnp.broadcast_to(handed["teacher"], rows.shape), its),
            *(jnp.full((images, n), 1 / n), centre, temperature),
        )
        return _as_means(found, images, ring.names)

    def initial_state(self) -> dict[str, jax.Array]:
        """Of centring=centre: the centre, and the mean of the teacher's distributions."""
        return prototypes.initial_state(self.options) if self.options.centring == "centre" else {}

    def update(self, state, statistics) -> dict[str, jax.Array]:
        """The state after a step."""
        return prototypes.update(self.options, state, statistics) if state else {}

    def _student(self, seen: Seen) -> jax.Array:
        """What the head reads of the student's views, [B, n, E]."""
        local = seen.views.local.image
        b, n = local.shape[:2]
        image = views.normalised(local.reshape(b * n, *local.shape[2:]), self.model.image)
        if self.options.reads == "embedding":
            own, found = seen.outputs.image_embed, seen.student("encode_image", image)[0]
        else:
            own, found = seen.tokens, seen.student("image_tokens", image)
        found = self._read(found, seen.leading).reshape(b, n, -1)
        if not self.options.image:
            return found
        own = self._read(own, seen.leading, seen.places)
        return jnp.concatenate([found, own[:, None]], axis=1)

    def _teacher(self, seen: Seen) -> jax.Array:
        """What the head reads of the teacher's view, [B, 1, E]."""
        image = jax.tree.map(lambda x: x[:, 0], seen.views.global_view.image)
        teacher = seen.teacher
        embedding = self.options.reads == "embedding"
        found = teacher.embed(image) if embedding else teacher.tokens(image)
        at = None
        if isinstance(image, Patches):
            at = places.of_grid(image.grid, image.pixels.shape[1])
        return self._read(found, teacher.leading, at)[:, None]

    def _read(self, x: jax.Array, leading: int, at: places.Places | None = None) -> jax.Array:
        """Embeddings [n, D], or tokens [n, N, E] -> [n, E]; an embedding with entries of the size of a token's."""
        if self.options.reads == "embedding":
            return x * x.shape[-1] ** 0.5
        return x[:, 0] if self.options.reads == "class" else places.mean(x[:, leading:], at)


def _as_means(found: prototypes.Compared, images: int, names: tuple[str, ...]) -> TermOutput:
    """The sums of the images of a device; the entropy is that of the mean distribution of all."""
    usage, all_images = found.usage, jnp.float32(images)
    if names:
        usage, all_images = jax.lax.psum((usage, all_images), names)
    count = jnp.ones(images)
    measures = prototypes.measures(found, usage / all_images, count)
    return TermOutput(
        Mean(found.loss.sum(), count.sum()),
        {name: Mean(value.sum.sum(), value.count.sum()) for name, value in measures.items()},
    )
