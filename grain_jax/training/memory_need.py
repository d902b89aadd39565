"""What the forward pass keeps in memory for the backward pass, by shapes alone."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grain_jax import config as config_lib
from grain_jax.models import grain
from grain_jax.training import forward as forward_lib
from grain_jax.training import sharding, train_step
from grain_jax.training.memory_check import state_bytes as state_bytes


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
    return forward, params, forward_lib.abstract_batch(config), keys


def _module(name_stack: str) -> str:
    """The module below the model, such as image/norm, of "jvp(GRAIN)/GRAIN.encode_image/image/norm"."""
    return "/".join(part for part in name_stack.split("/") if "GRAIN" not in part)


def checkpoint_bytes(_: config_lib.Config, program: train_step.Program) -> int:
    """Bytes of what a checkpoint of a program holds."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state))
