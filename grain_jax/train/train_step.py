"""One training step, a pure function: towers, losses over the global batch, gradients, update, metrics.

With `microbatches` > 1 the towers see a part of the batch at a time, but the losses still see all of it
(gradient caching, Gao et al. 2021). The embeddings of all parts are computed first, and the losses give their
cotangents. Then each part is run again to carry these back into the parameters. The result is the same as for
the full batch, not an average of smaller contrastive losses.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grain_jax import losses as losses_lib
from grain_jax.config import TOWER_MODULES, Config
from grain_jax.core import schema
from grain_jax.train import forward as forward_lib
from grain_jax.train import optim, sharding

MOST_QUERIES = 16  # up to so many queries, each has a metric

# Top level of the parameter tree -> the module that a `grad_norm/MODULE` is of; all else are heads.
_MODULES = {top: tower for tower, tops in TOWER_MODULES.items() for top in tops}
_MODULES |= {"decoder": "decoder", forward_lib.TERMS: "terms"}


class TrainState(NamedTuple):
    """The state that a checkpoint holds. The step is also the position in the data."""

    step: jax.Array  # int32 []
    params: Any
    opt_state: Any
    ema_params: Any  # {} without an average
    texts_dropped: Any  # int32 [], captions cut and descriptions dropped to fit rows, since step 0
    text_counts: Any  # uint32 [2], the sums of `Batch.text_counts` since step 0; modulo 2**32
    term_state: Any = {}  # of local loss terms, by name


def init_state(config: Config, tx: optax.GradientTransformation) -> TrainState:
    """A fresh TrainState from the config's seed, parameters boxed with their logical axes."""
    forward = forward_lib.Forward(config)
    params = forward.init()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if config.ema_decay else {},
        texts_dropped=jnp.zeros((), jnp.int32),
        text_counts=nn.Partitioned(jnp.zeros(2, jnp.uint32), (None,)),
        term_state=forward.initial_state(params),
    )


def dropout_keys(seed: int, step, index):
    """PRNG keys [B] of the examples at `index` [B] of the global batch, the same on every mesh."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def loss_and_grads(
    config: Config, mesh: Mesh | None, params, batch, keys, term_state: Mapping[str, Any] | None = None
):
    """The losses of a batch and the gradient of their total.

    Args:
      config: of the run.
      mesh: the device mesh, or None on one device.
      params: parameter tree.
      batch: global Batch.
      keys: dropout keys [B], or None.
      term_state: of the local loss terms; None: the state of step 0.

    Returns:
      (losses.Losses, gradients like `params`).
    """
    forward = forward_lib.Forward(config, mesh)
    apply = lambda params, batch, keys: forward(params, batch, keys, term_state)

    def total(outputs):
        losses = losses_lib.total_loss(
            outputs,
            batch,
            config.loss,
            reference=config.reference,
            mesh=mesh,
            batch_axes=sharding.BATCH_AXES if mesh is not None else (),
        )
        return losses.total, losses

    if config.microbatches == 1:
        of_all = lambda params: total(apply(params, batch, keys))
        (_, losses), grads = jax.value_and_grad(of_all, has_aux=True)(params)
        return losses, grads

    parts = Parts(config.microbatches, mesh)
    inputs = jax.tree.map(parts.cut, (batch, keys))
    _, outputs = jax.lax.scan(lambda _, part: ({}, apply(params, *part)), {}, inputs)
    cotangents, losses = jax.grad(total, has_aux=True)(parts.join(outputs))

    def backward(grads, part):
        inputs, cotangent = part
        _, vjp = jax.vjp(lambda params: apply(params, *inputs), params)
        return jax.tree.map(jnp.add, grads, vjp(cotangent)[0]), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    cotangents = parts.cotangents(cotangents)
    grads, _ = jax.lax.scan(backward, zeros, (inputs, cotangents))
    return losses, grads


class Parts(NamedTuple):
    """The parts of a batch that are micro-batches.

    All leading axes are cut alike, so that an image, its packing group and its key stay together. Each part
    takes a piece of every shard, and so lies on all devices.
    """

    count: int
    mesh: Mesh | None

    @property
    def shards(self) -> int:
        return 1 if self.mesh is None else sharding.batch_shards(self.mesh)

    def cut(self, x):
        """[B, ...] -> [parts, B / parts, ...]."""
        n = x.shape[0] // (self.shards * self.count)
        x = x.reshape(self.shards, self.count, n, *x.shape[1:]).swapaxes(0, 1)
        x = x.reshape(self.count, self.shards * n, *x.shape[3:])
        if self.mesh is None:
            return x
        placed = NamedSharding(self.mesh, PartitionSpec(None, sharding.BATCH_AXES))
        return jax.lax.with_sharding_constraint(x, placed)

    def join(self, outputs: schema.Outputs) -> schema.Outputs:
        """The outputs for the whole batch from the outputs of all parts, with a leading axis of parts."""

        def joined(x):
            n = x.shape[1] // self.shards
            x = x.reshape(self.count, self.shards, n, *x.shape[2:]).swapaxes(0, 1)
            return x.reshape(self.count * self.shards * n, *x.shape[3:])

        scales, statistics = outputs.scales, outputs.statistics
        of_images = jax.tree.map(joined, outputs._replace(scales=None, statistics={}))
        return of_images._replace(
            scales=jax.tree.map(lambda x: x[0], scales),
            statistics=jax.tree.map(lambda x: x.sum(0), statistics),
        )

    def cotangents(self, whole: schema.Outputs) -> schema.Outputs:
        """The cotangents of the outputs of all parts, from those of the result of `join`."""

        def of_first(x):  # the scales of all parts are the same, so one part carries their cotangents back
            first = jnp.arange(self.count) == 0
            return jnp.where(first.reshape(-1, *[1] * x.ndim), x, 0)

        repeat = lambda x: jnp.broadcast_to(x, (self.count, *x.shape))
        of_images = jax.tree.map(self.cut, whole._replace(scales=None, statistics={}))
        return of_images._replace(
            scales=jax.tree.map(of_first, whole.scales), statistics=jax.tree.map(repeat, whole.statistics)
        )


def grad_norms(grads, frozen: Sequence[str]) -> dict[str, jax.Array]:
    """Norms of the gradient of the parameters that are not `frozen`, of all and of each module.

    Returns: `grad_norm`, and `grad_norm/image`, `/text`, `/decoder` and `/heads` (projections, boxes, logit
      scale and bias); without modules that are frozen or that the model does not have.
    """
    modules: dict[str, list] = {}
    paths = jax.tree_util.tree_leaves_with_path(grads)
    for (path, leaf), is_frozen in zip(paths, jax.tree.leaves(optim.frozen_mask(grads, frozen))):
        if not is_frozen:
            modules.setdefault(_MODULES.get(path[0].key, "heads"), []).append(leaf)
    norms = {f"grad_norm/{module}": optax.tree.norm(leaves) for module, leaves in modules.items()}
    return {"grad_norm": optax.tree.norm(list(norms.values())), **norms}  # gradients are read once


def loss_metrics(losses: losses_lib.Losses) -> dict[str, jax.Array]:
    """The total, the terms and their measures as metrics; docs/diagnostics.md explains each."""
    out = {"loss": losses.total}
    out |= {f"loss_{name}": value for name, value in losses.terms.items()}
    for name, value in losses.measures.items():
        if value.ndim == 0:
            out[name] = value
        elif len(value) <= MOST_QUERIES:
            out |= {f"{name}/{i}": value[i] for i in range(len(value))}
    share = losses.measures.get("query_share")
    if share is not None and len(share) > 1:
        out["query_usage_entropy"] = jax.scipy.special.entr(share).sum() / math.log(len(share))
    return out


def make_train_step(
    config: Config, tx: optax.GradientTransformation, schedule: optax.Schedule, mesh: Mesh | None = None
):
    """The function (state, batch) -> (state, metrics) that the trainer compiles."""
    forward = forward_lib.Forward(config, mesh)

    def train_step(state: TrainState, batch: schema.Batch):
        keys = dropout_keys(config.seed, state.step, jnp.arange(batch.caption_mask.shape[0]))
        losses, grads = loss_and_grads(config, mesh, state.params, batch, keys, state.term_state)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = optim.clip_logit_scales(params, config.frozen)
        ema = state.ema_params
        if config.ema_decay:
            ema = optim.average(params, ema, config.ema_decay, config.frozen)
        # Summed together, in one collective.
        sums = jnp.concatenate([batch.texts_dropped[:, None], batch.text_counts], axis=1).sum(0)
        dropped = state.texts_dropped + sums[0]
        text_counts = state.text_counts + sums[1:].astype(jnp.uint32)
        metrics = {
            **loss_metrics(losses),
            **{
                name: jnp.exp(state.params[name])
                for name in ("logit_scale", "region_logit_scale")
                if name in state.params
            },
            "learning_rate": schedule(state.step),
            **grad_norms(grads, config.frozen),
            "texts_dropped": dropped,
            "texts": text_counts[0],
            "texts_too_long": text_counts[1],
        }
        step = state.step + 1
        after = TrainState(step, params, opt_state, ema, dropped, text_counts)
        term_state = forward.update_state(state.term_state, losses.statistics, params)
        return after._replace(term_state=term_state), metrics

    return train_step


class Program(NamedTuple):
    """The functions that are compiled for a run, the same for the trainer and `grain-jax plan`."""

    state: TrainState  # ShapeDtypeStructs
    shardings: TrainState  # NamedShardings
    batch: schema.Batch  # ShapeDtypeStructs
    batch_sharding: NamedSharding
    init: Callable  # jitted: () -> state, fresh from the seed; see `initialise.state_of_step_0`
    term_state: Callable  # jitted: params -> `TrainState.term_state` of step 0 beside these parameters
    step: Callable  # jitted: (state, batch) -> (state, metrics); donates `state`


def build(config: Config, mesh: Mesh, *, total_steps: int, steps_per_epoch: float) -> Program:
    """The program of a run on that mesh; nothing is computed yet.

    Raises:
      ShardingError: the batch or a parameter does not fit the mesh.
    """
    sharding.check_batch(config, mesh)
    schedule = optim.learning_rate(
        config.optim, total_steps=total_steps, steps_per_epoch=steps_per_epoch, reference=config.reference
    )
    of_run = dataclasses.replace(config.optim, frozen=config.frozen)
    tx = optim.optimizer(of_run, schedule, config.reference)
    init = functools.partial(init_state, config, tx)
    state, shardings = sharding.place_state(jax.eval_shape(init), config.sharding, mesh)
    batch_sharding = sharding.batch_sharding(mesh)
    return Program(
        state,
        shardings,
        forward_lib.abstract_batch(config),
        batch_sharding,
        init=jax.jit(lambda: sharding.unbox(init()), out_shardings=shardings),
        term_state=jax.jit(
            forward_lib.Forward(config, mesh).initial_state, out_shardings=shardings.term_state
        ),
        step=jax.jit(
            make_train_step(config, tx, schedule, mesh),
            in_shardings=(shardings, batch_sharding),
            out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
        ),
    )
