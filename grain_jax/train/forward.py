"""The forward pass of a training step: the model and its local loss terms, on the images of a micro-batch.

The step, the plan's memory and the count of FLOPs all trace this one function. Without local terms it is a
call of the model.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grain_jax.config import Config
from grain_jax.core import errors, schema
from grain_jax.losses import local, total
from grain_jax.models import grain, lora, placement
from grain_jax.train import optim, sharding

TERMS = "terms"  # the top level of the parameter tree below which terms have theirs
KEEP = "model.image.keep"  # no name of a term has a point


def abstract_batch(config: Config) -> schema.Batch:
    """The shapes of the config's global Batch, as ShapeDtypeStructs."""
    b, size = config.batch_size, config.model.image.image_size
    captions, r = config.input.captions_per_image, config.input.max_regions
    h = config.input.negatives_per_region
    group, rows = config.text_layout
    shape_of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    row = shape_of(jnp.int32, b // group, rows, config.row_length)
    return schema.Batch(
        image=shape_of(jnp.uint8, b, size, size, 3),
        text_tokens=row,
        text_positions=row,
        text_segments=row,
        caption_at=shape_of(jnp.int32, b, captions, 2),
        caption_id=shape_of(jnp.int32, b, captions),
        caption_mask=shape_of(jnp.bool_, b, captions),
        description_at=shape_of(jnp.int32, b, r, 2),
        description_id=shape_of(jnp.int32, b, r),
        region_boxes_cxcywh=shape_of(jnp.float32, b, r, 4),
        region_mask=shape_of(jnp.bool_, b, r),
        texts_dropped=shape_of(jnp.int32, b // group),
        text_counts=shape_of(jnp.int32, b // group, 2),
        negative_at=shape_of(jnp.int32, b, r, h, 2) if h else None,
        negative_mask=shape_of(jnp.bool_, b, r, h) if h else None,
    )


def patches_seen(config: Config) -> int:
    """The patches of an image that the tower sees in a step: their share, rounded, and at least one."""
    tower = config.model.image
    patches = (tower.image_size // tower.patch_size) ** 2
    return max(1, math.floor(tower.keep * patches + 0.5))


def draw_kept(keys: jax.Array, patches: int, count: int) -> jax.Array:
    """The numbers of the kept patches, ascending, int32 [B, count] (FLIP, Li et al. 2023, arXiv 2212.00794).

    What is drawn is a function of the keys of the images, so micro-batches, meshes and resumes agree.
    """
    order = jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys)
    # Not top_k, for which XLA would gather the patches of all devices.
    chosen = jnp.argsort(order, axis=1)[:, :count]
    return placement.by_batch(jnp.sort(chosen, axis=1).astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class Forward:
    """The forward pass of a run."""

    config: Config
    mesh: Mesh | None = None  # that the activations lie on; None on one device

    @functools.cached_property
    def model(self) -> grain.GRAIN:
        """The module of the run."""
        c = self.config
        return grain.GRAIN(c.model, c.dtype, c.remat, c.optim.lora.scale)

    @functools.cached_property
    def terms(self) -> dict[str, local.LocalTerm]:
        """The local terms of the run by name. Raises UserError: one is not found, or misses something."""
        terms, faults = {}, []
        for name, entry in total.local_entries(self.config.loss).items():
            faults += [f"loss.terms.{name}: {x}" for x in entry.cls.faults(entry.options, self.config)]
            terms[name] = entry.cls(entry.options, self.config.model, self.config.dtype)
        if terms and self.config.model.image.keep != 1:
            faults.append(
                f"{KEEP}: got {self.config.model.image.keep} with {', '.join(terms)} of loss.terms,"
                " which read all patches; expected 1"
            )
        if faults:
            raise errors.UserError("\n".join(faults))
        return terms

    def init(self) -> Any:
        """The parameters at step 0, boxed with their logical axes; terms have theirs below TERMS."""
        params = lora.init(self.config)
        if not self.terms:
            return params
        key, of_terms = jax.random.key(self.config.seed), {}
        for name, term in self.terms.items():
            term_key = jax.random.fold_in(key, zlib.crc32(f"{TERMS}/{name}".encode()))
            # What a parameter is does not depend on what the term sees.
            of_terms[name] = term.init(term_key, self._seen_at_init(params, name)).get("params", {})
        non_empty = {name: tree for name, tree in of_terms.items() if tree}
        return {**params, TERMS: non_empty} if non_empty else params

    def initial_state(self, params: Any) -> dict[str, Any]:
        """`TrainState.term_state` of step 0, from the parameters of step 0, boxed or not, as they are."""
        boxed = any(map(sharding.is_box, jax.tree.leaves(params, is_leaf=sharding.is_box)))

        def in_float32(x):
            if sharding.is_box(x):
                return x
            x = jnp.asarray(x, jnp.float32)
            return nn.Partitioned(x, (None,) * x.ndim) if boxed else x

        states = {name: term.initial_state(_parameters(params, name)) for name, term in self.terms.items()}
        return {
            name: jax.tree.map(in_float32, state, is_leaf=sharding.is_box)
            for name, state in states.items()
            if jax.tree.leaves(state)
        }

    def update_state(
        self, state: Mapping[str, Any], statistics: Mapping[str, Any], params: Any
    ) -> dict[str, Any]:
        """`TrainState.term_state` after a step.

        Args:
          state: the state before the step.
          statistics: of the terms by name, of the global batch.
          params: all parameters after the step.
        """
        return {
            name: self.terms[name].update(term_state, statistics[name], _parameters(params, name))
            for name, term_state in state.items()
        }

    def __call__(
        self,
        params: Any,
        batch: schema.Batch,
        keys: jax.Array | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> schema.Outputs:
        """The outputs for the images of a micro-batch.

        Args:
          params: parameter tree.
          batch: of the images; with `model.image.keep` the model sees some of their patches.
          keys: PRNG keys [B], or None: no dropout, and the same draws for all images.
          state: `TrainState.term_state`; None: the state of step 0.
        """
        params = optim.stop_frozen(params, self.config.frozen)
        with placement.on(self.mesh, sharding.BATCH_AXES):
            outputs, seen = self._outputs_and_views(params, batch, keys)
            state = self.initial_state(params) if state is None else state
            results = {}
            for name, term in self.terms.items():
                variables = {"params": _parameters(params, name).term}
                with jax.named_scope(TERMS), jax.named_scope(name):
                    output: Any = term.apply(variables, seen(name, state))
                    results[name] = _as_floats(output)
        statistics = {name: output.statistics for name, output in results.items()}
        per_image = {name: output._replace(statistics={}) for name, output in results.items()}
        return outputs._replace(local=per_image, statistics=statistics)

    def _outputs_and_views(self, params, batch: schema.Batch, keys: jax.Array | None = None):
        """The outputs of the model, and a function: name and state of a local term -> what it sees."""
        of_model = without_terms(params)
        # A method asks for these whatever it computes.
        scalars = {name: x for name, x in of_model.items() if name.startswith("logit_")}

        def apply(method: str, *args: Any, params: Any = None, **kwargs: Any) -> Any:
            chosen = of_model if params is None else {**scalars, **params}
            return self.model.apply({"params": chosen}, *args, method=method, **kwargs)

        tower, images = self.config.model.image, batch.caption_mask.shape[0]
        no_keys = jax.vmap(jax.random.key)(jnp.zeros(images, jnp.uint32))
        for_draws = no_keys if keys is None else keys
        kept = None
        if tower.keep != 1:
            with jax.named_scope(KEEP):
                patches = (tower.image_size // tower.patch_size) ** 2
                kept = draw_kept(folded(for_draws, KEEP), patches, patches_seen(self.config))
        outputs, features = apply("outputs_and_features", batch, keys, kept)

        def seen(name: str, state: Mapping[str, Any]) -> local.Seen:
            return local.Seen(
                batch=batch,
                tokens=features.tokens,
                text_hidden=features.text,
                outputs=outputs,
                leading=grain.leading_tokens(self.config.model),
                keys=folded(for_draws, name),
                apply=apply,
                state=jax.lax.stop_gradient(state.get(name, {})),
            )

        return outputs, seen

    def _seen_at_init(self, params, name) -> local.Seen:
        """What a term sees of one packing group of zeros."""
        small = dataclasses.replace(self.config, batch_size=self.config.text_layout[0])
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_batch(small))
        params = sharding.unbox(params)
        return self._outputs_and_views(params, batch)[1](name, self.initial_state(params))


def _as_floats(output: local.LocalOutput) -> local.LocalOutput:
    """Ints and bools, such as counts, as float32; no gradient of measures and statistics."""
    as_float = lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    converted = local.LocalOutput(*jax.tree.map(lambda x: as_float(jnp.asarray(x)), tuple(output)))
    stop = jax.lax.stop_gradient
    return converted._replace(measures=stop(converted.measures), statistics=stop(converted.statistics))


def folded(keys: jax.Array, name: str) -> jax.Array:
    """The keys [B] of the images for what has this name."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, zlib.crc32(name.encode()))


def _parameters(params: Any, name: str) -> local.Parameters:
    """What the term of that name sees of all parameters."""
    return local.Parameters(without_terms(params), params.get(TERMS, {}).get(name, {}))


def without_terms(params: Any) -> Any:
    """The parameters of the model alone, as evaluations and exports take them."""
    return {name: tree for name, tree in params.items() if name != TERMS}
