"""What a training step needs in memory, by shapes alone: its state, and what its forward pass keeps."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grain_jax import config as config_lib
from grain_jax.models import grain
from grain_jax.training import flops, optim, sharding, train_step
from grain_jax.training import forward as forward_lib

FLOAT = 4  # bytes


class Kept(NamedTuple):
    """An array that the forward pass keeps for the backward pass."""

    bytes: int
    shape: str  # "bfloat16[12,64,197,768]"
    where: str  # the module that makes it


def kept(config: config_lib.Config, images: int) -> list[Kept]:
    """The arrays that the forward pass of the towers keeps for the backward pass, the largest first.

    Args:
      config: model, dtype, remat policy and the layout of texts.
      images: of one device and one micro-batch, a multiple of the packing group.

    Returns:
      The arrays without parameters and inputs.
    """
    forward, params, *inputs = _forward(config, images)

    def residuals(params, *inputs):
        apply = lambda params: forward(params, *inputs)
        return jax.tree.leaves(jax.vjp(apply, params)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, *inputs).jaxpr
    # Inputs and constants have no equation; what stops the gradient of a frozen parameter makes no array.
    makers = {
        id(v): equation
        for equation in jaxpr.eqns
        for v in equation.outvars
        if equation.primitive.name != "stop_gradient"
    }
    kept_arrays = {id(v): v.aval for v in jaxpr.outvars if id(v) in makers}
    found = [
        Kept(
            aval.size * aval.dtype.itemsize,
            f"{aval.dtype}[{','.join(map(str, aval.shape))}]",
            _module(str(makers[key].source_info.name_stack)),
        )
        for key, aval in kept_arrays.items()
    ]
    return sorted(found, reverse=True)


def _forward(config: config_lib.Config, images: int) -> tuple[Any, ...]:
    """The forward pass of so many images, and the shapes of its arguments."""
    config = dataclasses.replace(config, batch_size=images)
    model = grain.GRAIN(config.model, config.dtype, config.remat)
    forward = forward_lib.Forward(model, config)
    params = sharding.unbox(jax.eval_shape(forward.init))
    keys = jax.eval_shape(lambda: train_step.dropout_keys(0, 0, jnp.arange(images)))
    given = jax.eval_shape(forward.given_at_step_0, params)
    return forward, params, forward_lib.abstract_batch(config), keys, given


def _of_terms(config: config_lib.Config, images: int) -> int:
    """Bytes of three arrays such as the largest that the forward pass makes of so many images, with views and teacher.

    These make theirs without a gradient, so that `kept` has none of them. 0 without local terms.
    """
    if not forward_lib.Forward(grain.GRAIN(config.model, config.dtype), config).terms:
        return 0
    forward, *inputs = _forward(config, images)
    return 3 * _largest(jax.make_jaxpr(lambda *given: forward(*given))(*inputs).jaxpr)


def _largest(jaxpr: Any) -> int:
    """Bytes of the largest array that an equation makes, those in loops and calls included."""
    arrays = (v.aval for equation in jaxpr.eqns for v in equation.outvars)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    own = (x.size * x.dtype.itemsize for x in arrays if not is_key(x))
    inner = (_largest(part) for equation in jaxpr.eqns for part in flops.jaxprs(equation.params))
    return max((*own, *inner), default=0)


def _module(name_stack: str) -> str:
    """The module below the model, such as image/norm, of "jvp(GRAIN)/GRAIN.encode_image/image/norm"."""
    return "/".join(part for part in name_stack.split("/") if "GRAIN" not in part)


def state_bytes(program: train_step.Program) -> dict[str, int]:
    """Bytes per device of the arguments of a program, by kind, before any padding."""
    state, shardings = program.state, program.shardings
    batch = jax.tree.leaves(program.batch)
    return {
        "parameters": _total(state.params, shardings.params),
        "moments": _total(state.opt_state, shardings.opt_state),
        "ema": _total(state.ema_params, shardings.ema_params),
        "batch": _total(batch, [program.batch_sharding] * len(batch)),
    }


def checkpoint_bytes(program: train_step.Program) -> int:
    """Bytes of what a checkpoint of a program holds."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state))


def trained_bytes(program: train_step.Program, frozen: Sequence[str]) -> int:
    """Bytes per device of the parameters that have a gradient."""
    params, fixed = program.state.params, optim.frozen_mask(program.state.params, frozen)
    trained = jax.tree.map(lambda x, fixed: () if fixed else x, params, fixed)
    shardings = jax.tree.map(lambda s, fixed: () if fixed else s, program.shardings.params, fixed)
    return _total(trained, shardings)


def _total(shapes: Any, shardings: Any) -> int:
    return sum(
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings))
    )


def temporaries(
    config: config_lib.Config, program: train_step.Program, shards: int
) -> dict[str, int]:
    """Bytes per device of the temporaries of a step, by arithmetic; right to a fifth on accelerators.

    Args:
      config: of the run.
      program: built from it.
      shards: parts that the batch is cut into.

    Returns:
      gradients, activations (kept by the remat policy), layer (one layer, view or teacher at work), losses.
    """
    images = config.batch_size // shards
    part = images // config.microbatches
    nothing_again = dataclasses.replace(
        config,
        remat="none",
        optim=dataclasses.replace(config.optim, frozen=(), lora=config_lib.Lora()),
    )
    # Three tiles (logits, their softmax, the mask), and three blocks: in use, arriving, and of the sums.
    captions, regions = config.input.captions_per_image, config.input.max_regions
    boxes = regions if config.model.boxes.kind != "none" else 0
    vectors = images * config.loss.gather * (1 + captions + regions + boxes)
    tile = min(config.loss.tile, images * max(captions, regions))
    negatives = images * regions * config.input.negatives_per_region  # their gradient
    activations = everything = sum(k.bytes for k in kept(config, part))
    if nothing_again != config:
        everything = sum(k.bytes for k in kept(nothing_again, part))
    return {
        "gradients": trained_bytes(program, config.frozen) * min(config.microbatches, 2),
        "activations": activations,
        "layer": max(everything // config.model.image.depth, _of_terms(config, part)),
        "losses": FLOAT * (3 * tile**2 + (3 * vectors + negatives) * config.model.embed_dim),
    }
