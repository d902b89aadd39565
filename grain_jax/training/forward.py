"""The forward pass of a training step: the model and its local loss terms, on the images of a micro-batch.

The step, the plan's memory and the count of FLOPs all trace this one function. Without local terms it is a call of the
model.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grain_jax import config as config_lib
from grain_jax.config import Config
from grain_jax.config import keep as keep_lib
from grain_jax.core import errors, schema
from grain_jax.losses import local, total
from grain_jax.models import grain, lora, placement
from grain_jax.terms import views
from grain_jax.training import kept as kept_lib
from grain_jax.training import optim, sharding
from grain_jax.training import teacher as teacher_lib

TERMS = teacher_lib.TERMS
VIEWS = "input.views"  # no name of a term has a point
KEEP = "model.image.keep"


class Given(NamedTuple):
    """What a step gives the terms beside parameters and batch; no gradient is taken of it."""

    teacher: Any  # `TrainState.teacher`
    state: Mapping[str, Any]  # `TrainState.term_state`
    share: Any  # float32 [], the step divided by the length of the run


def abstract_batch(config: Config) -> schema.Batch:
    """The shapes of the config's global Batch, as ShapeDtypeStructs; of several sequence lengths of the longest."""
    b, size, patch = config.batch_size, config.model.image.image_size, config.model.image.patch_size
    captions, r = config.input.captions_per_image, config.input.max_regions
    h = config.input.negatives_per_region
    group, rows = config.text_layout
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    row = of(jnp.int32, b // group, rows, config.row_length)
    image: Any = of(jnp.uint8, b, size, size, 3)
    if config.input.sequence_lengths:
        length = max(config.input.every_length)
        image = schema.Patches(of(jnp.uint8, b, length, 3 * patch**2), of(jnp.int32, b, 2))
    return schema.Batch(
        image=image,
        text_tokens=row,
        text_positions=row,
        text_segments=row,
        caption_at=of(jnp.int32, b, captions, 2),
        caption_id=of(jnp.int32, b, captions),
        caption_mask=of(jnp.bool_, b, captions),
        description_at=of(jnp.int32, b, r, 2),
        description_id=of(jnp.int32, b, r),
        region_boxes_cxcywh=of(jnp.float32, b, r, 4),
        region_mask=of(jnp.bool_, b, r),
        texts_dropped=of(jnp.int32, b // group),
        text_counts=of(jnp.int32, b // group, 2),
        negative_at=of(jnp.int32, b, r, h, 2) if h else None,
        negative_mask=of(jnp.bool_, b, r, h) if h else None,
        region_scores=of(jnp.float32, b, r) if config.input.region_scores else None,
        **teacher_lib.of_batch(config),
    )


def patches_seen(config: Config) -> int:
    """The patch tokens of an image in a step that computes most, with padding."""
    tower = config.model.image
    square = ((tower.image_size // tower.patch_size) ** 2,)
    found = keep_lib.together(tower.keep, config.input.sequence_lengths or square)
    return max(kept_lib.count(keep, max(lengths)) for keep, lengths in found)


def shape_faults(config: Config) -> list[str]:
    """Why a term or the teacher of the run takes no images in their own shape, a line each. Raises UserError."""
    found = total.local_entries(config.loss).items()
    faults = [_squares_alone(name) for name, entry in found if not entry.cls.any_grid]
    return [*faults, *filter(None, [teacher_lib.shape_fault(config)])]


def _squares_alone(name: str) -> str:
    return (
        f"loss.terms.{name}: got images in their own shape, or some of their patches, expected full squares"
        " (input.sequence_lengths=(), model.image.keep=1); a term with any_grid = True takes others"
    )


@dataclasses.dataclass(frozen=True)
class Forward:
    """The forward pass of a run.

    Attributes:
      model: the GRAIN module.
      config: of the run.
      mesh: that the activations lie on, or None on one device.
    """

    model: grain.GRAIN
    config: Config
    mesh: Mesh | None = None

    @functools.cached_property
    def terms(self) -> dict[str, local.LocalTerm]:
        """The local terms of the run by name. Raises UserError: one cannot be found, or misses something in this run."""
        found, faults = {}, []
        for name, entry in total.local_entries(self.config.loss).items():
            faults += [
                f"loss.terms.{name}: {x}" for x in entry.cls.faults(entry.options, self.config)
            ]
            found[name] = entry.cls(
                entry.options,
                self.config.model,
                teacher_model=teacher_lib.model_of(self.config),
                dtype=self.config.dtype,
                remat=self.config.remat,
            )
        if faults:
            raise errors.UserError("\n".join(faults))
        return found

    def check(self, images: int) -> None:
        """Whether a micro-batch of so many images a device has whole groups of every term. Raises UserError."""
        for name, term in self.terms.items():
            group = term.group(term.options)
            if images % group:
                good = config_lib.divisors(images)
                raise errors.UserError(
                    f"loss.terms.{name}.group: got {group}, expected a divisor of the {images} images of a device's"
                    f" micro-batch: {', '.join(map(str, good))}"
                )

    def init(self) -> Any:
        """The parameters of the run at step 0, from its seed, boxed with their logical axes; those of terms below TERMS."""
        params = lora.init(self.model, self.config)
        if not self.terms:
            return params
        key, of_terms = jax.random.key(self.config.seed), {}
        for name, term in self.terms.items():
            own = jax.random.fold_in(key, zlib.crc32(f"{TERMS}/{name}".encode()))
            # What a parameter is does not depend on what the term sees.
            seen = functools.partial(self._seen_at_init, sharding.unbox(params), name)
            of_terms[name] = term.init(own, seen()).get("params", {})
        found = {name: tree for name, tree in of_terms.items() if tree}
        return {**params, TERMS: found} if found else params

    def initial_state(self) -> dict[str, Any]:
        """`TrainState.term_state` of step 0, boxed."""
        found = {name: term.initial_state() for name, term in self.terms.items()}
        box = lambda x: nn.Partitioned(jnp.asarray(x, jnp.float32), (None,) * jnp.ndim(x))
        return {name: jax.tree.map(box, state) for name, state in found.items() if state}

    def share_of_term(self, name: str, share: jax.Array) -> jax.Array:
        """The share of the steps since a term came on, from that of the run."""
        weight = self.config.loss.schedules.get(name)
        begin = weight["from"] if weight and not weight["start"] else 0.0
        return jnp.maximum(share - begin, 0) / (1 - begin) if 0 < begin < 1 else share

    def update_state(self, state: Mapping[str, Any], statistics: Mapping[str, Any]):
        """`TrainState.term_state` after a step, from the statistics of the global batch; that of a term that is off stays."""
        return {
            name: self.terms[name].update(own, statistics[name]) if name in self.terms else own
            for name, own in state.items()
        }

    def __call__(
        self,
        params: Any,
        batch: schema.Batch,
        keys: jax.Array | None = None,
        given: Given | None = None,
    ) -> schema.Outputs:
        """The outputs for the images of a micro-batch.

        Args:
          params: parameter tree.
          batch: of the images; with `model.image.keep` the model sees some of their patches, teacher and views all.
          keys: PRNG keys [B], or None: no dropout, and the same draws for all images.
          given: None: no teacher, the terms' state of step 0.
        """
        params = optim.stop_frozen(params, self.config.frozen)
        with placement.on(self.mesh, sharding.BATCH_AXES), lora.beside(self.config.optim.lora):
            if not self.terms:
                kept = self._kept(batch, keys)
                return self.model.apply({"params": params}, batch, keys, kept)  # type: ignore[return-value]
            return self._with_terms(params, batch, keys, given)

    def _kept(self, batch: schema.Batch, keys: jax.Array | None) -> jax.Array | None:
        """The patches that the model sees (`GRAIN.image_tokens`); None: all."""
        tower = self.config.model.image
        if tower.keep == 1:
            return None
        with jax.named_scope(KEEP):
            return kept_lib.draw(_folded(_or_equal(keys, batch), KEEP), batch.image, tower)

    def _with_terms(self, params, batch, keys, given) -> schema.Outputs:
        outputs, seen = self._scene(params, batch, keys, given)
        of_terms, found = params.get(TERMS, {}), {}
        for name, term in self.terms.items():
            with jax.named_scope(TERMS), jax.named_scope(name):
                output: Any = term.apply({"params": of_terms.get(name, {})}, seen(name))
                found[name] = _as_floats(output)
        if not total.reads_embeddings(self.config.loss):
            # So that they are not computed: a loop over micro-batches would keep them.
            outputs = jax.tree.map(jnp.zeros_like, outputs)
        return outputs._replace(local=found)

    def _scene(
        self, params, batch: schema.Batch, keys=None, given: Given | None = None
    ) -> tuple[schema.Outputs, Callable[[str], local.Seen]]:
        """The outputs of the model, and what the term of a name sees."""
        apply = functools.partial(_apply, self.model, without_terms(params))
        outputs, features = apply("outputs_and_features", batch, keys, self._kept(batch, keys))
        of_step = self.given_at_step_0(params) if given is None else given
        keys = _or_equal(keys, batch)
        with jax.named_scope(TERMS), jax.named_scope(VIEWS):  # the same for all terms
            made = views.make(batch.image, _folded(keys, VIEWS), self.config.input.views)
        teacher = teacher_lib.of_step(self.config, of_step.teacher, params, batch)

        def seen(name: str) -> local.Seen:
            if features.places is not None and not self.terms[name].any_grid:
                raise errors.UserError(_squares_alone(name))
            return local.Seen(
                batch=batch,
                tokens=features.tokens,
                places=features.places,
                hidden=features.hidden,
                text_features=features.text,
                outputs=outputs,
                leading=grain.leading_tokens(self.config.model),
                keys=_folded(keys, name),
                student=apply,
                teacher=teacher and teacher.of_term(name),
                views=made,
                state=of_step.state.get(name, {}),
                share=self.share_of_term(name, of_step.share),
                text_length=self.config.text_length,
            )

        return outputs, seen

    def given_at_step_0(self, params) -> Given:
        """What the terms are given at step 0; of a teacher that is a checkpoint zeros."""
        teacher = sharding.unbox(teacher_lib.initial(self.config, params))
        return Given(teacher, sharding.unbox(self.initial_state()), jnp.zeros(()))

    def _seen_at_init(self, params, name) -> local.Seen:
        """What a term sees of one packing group of zeros."""
        group = self.terms[name].group(self.terms[name].options)
        small = dataclasses.replace(self.config, batch_size=group * self.config.text_layout[0])
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_batch(small))
        return self._scene(params, batch)[1](name)


def _as_floats(output: local.LocalOutput) -> local.LocalOutput:
    """Ints and bools, such as counts, as float32; no gradient of measures and statistics."""
    as_float = lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    found = local.LocalOutput(*jax.tree.map(lambda x: as_float(jnp.asarray(x)), tuple(output)))
    stop = jax.lax.stop_gradient
    return found._replace(measures=stop(found.measures), statistics=stop(found.statistics))


def _or_equal(keys: jax.Array | None, batch: schema.Batch) -> jax.Array:
    """The keys of the images, or equal ones."""
    if keys is not None:
        return keys
    return jax.vmap(jax.random.key)(jnp.zeros(batch.caption_mask.shape[0], jnp.uint32))


def _folded(keys: jax.Array, name: str) -> jax.Array:
    """Keys [B] of the images for what has this name."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, zlib.crc32(name.encode()))


def _apply(model: grain.GRAIN, params: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    return model.apply({"params": params}, *args, method=method, **kwargs)


def without_terms(params: Any) -> Any:
    """The parameters of the model alone, as evaluations and exports take them."""
    return {name: tree for name, tree in params.items() if name != TERMS}
