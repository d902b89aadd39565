"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank factors that are trained beside dense maps of the towers.

y = x W + (alpha / rank) (x A) B. A map has factors where its parameters hold `lora_a` [layers, *in, rank] and `lora_b`
[layers, rank, *out]. W is frozen (`config.Config.frozen`), and A B is never made in training.
"""

import contextlib
import contextvars
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes

from grain_jax import config as config_lib
from grain_jax.core import errors, low_rank, named
from grain_jax.models import grain, layers, programs

_scale: contextvars.ContextVar[float] = contextvars.ContextVar("scale", default=0.0)


def init(model: grain.GRAIN, config: config_lib.Config) -> Any:
    """The parameters of a run at step 0, from its seed, boxed with their logical axes.

    The model's are `grain.init`'s. A is normal with the variance 1 / (3 * inputs), as in torch's linear layers and peft.
    B is zero, so that the model is its base.

    Raises:
      UserError: as `maps_of`; or `optim.frozen` freezes a factor.
    """
    key = jax.random.key(config.seed)
    params: Any = grain.init(model, key)
    lora = config.optim.lora
    if not lora.rank:
        return params
    shapes = grain.parameter_shapes(config.model)
    for name in maps_of(config.model, lora, shapes):
        *above, last = name.split("/")
        parent = params
        for part in above:
            parent = parent[part]
        parent[last] = parent[last] | _factors(parent[last]["kernel"], name, lora.rank, key)
    for pattern in config.optim.frozen:
        for name in low_rank.maps_in(params):
            for factor in (low_rank.A, low_rank.B):
                if re.fullmatch(pattern, f"{name}/{factor}"):
                    raise errors.UserError(
                        f"optim.frozen: {pattern!r} freezes {name}/{factor}, which optim.lora trains; expected no"
                        " pattern for a tower with factors, whose other parameters are frozen already"
                    )
    return params


def _factors(kernel: nn.LogicallyPartitioned, name: str, rank: int, key: jax.Array) -> dict:
    """A and B beside the boxed kernel of a map, with the axes of its inputs and outputs."""
    inputs = 1 + config_lib.LAYER_MAPS[name.partition("/blocks/")[2]]
    shape, axes = kernel.value.shape, kernel.names
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    deviation = (3 * math.prod(shape[1:inputs])) ** -0.5
    a = deviation * jax.random.normal(key, (*shape[:inputs], rank))
    b = jnp.zeros((shape[0], rank, *shape[inputs:]))
    return {
        low_rank.A: nn.LogicallyPartitioned(a, (*axes[:inputs], "vector")),
        low_rank.B: nn.LogicallyPartitioned(b, (axes[0], "vector", *axes[inputs:])),
    }


def maps_of(
    model: config_lib.Model, lora: config_lib.Lora, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The names of the dense maps that have factors, such as "image/blocks/attention/query".

    Args:
      model: of the run.
      lora: `optim.lora`.
      shapes: of the parameters of the model by name.

    Raises:
      UserError: a pattern that matches nothing or something else, a tower that would be frozen without a factor, or a
        rank above the smaller side of a map.
    """
    modules = list(dict.fromkeys(name.rpartition("/")[0] for name in shapes if "/" in name))
    known = {f"{tower}/blocks/{name}" for tower in ("image", "text") for name in config_lib.LAYER_MAPS}
    maps = [name for name in modules if name in known]
    chosen = dict.fromkeys(
        name for pattern in lora.modules for name in _matched(pattern, model, modules, maps)
    )
    for tower in ("image", "text"):
        if lora.has(tower) and not any(name.startswith(f"{tower}/") for name in chosen):
            raise errors.UserError(
                f"optim.lora.modules: no map of the {tower} tower ({getattr(model, tower).tower}) matches"
                f" {lora.modules!r}, and it would be frozen; expected a pattern that matches one, or patterns of the other tower only"
            )
    for name in chosen:
        inputs = 1 + config_lib.LAYER_MAPS[name.partition("/blocks/")[2]]
        shape = shapes[f"{name}/kernel"]
        sides = math.prod(shape[1:inputs]), math.prod(shape[inputs:])
        if lora.rank > min(sides):
            raise errors.UserError(
                f"optim.lora.rank: got {lora.rank}, expected at most {min(sides)}, the smaller side of {name}, which maps"
                f" {sides[0]} to {sides[1]}"
            )
    return list(chosen)


def _matched(pattern: str, model: config_lib.Model, modules: list[str], maps: list[str]) -> list[str]:
    """The maps that a pattern matches. Raises UserError: it matches nothing, or something else."""
    matched = [name for name in modules if re.fullmatch(pattern, name)]
    external = {t: named.is_external(getattr(model, t).tower) for t in ("image", "text")}
    wrong = [x for x in matched if x not in maps or external[x.partition("/")[0]]]
    if wrong or not matched:
        fault = f"matches {wrong[0]}" if wrong else "matches no module"
        raise errors.UserError(
            f"optim.lora.modules: {pattern!r} {fault}; expected dense maps of layers of built-in towers:"
            " (image|text)/blocks/attention/(query|key|value|out), (image|text)/blocks/mlp/(in|gate|out)"
        )
    return matched


@contextlib.contextmanager
def beside(lora: config_lib.Lora) -> Iterator[None]:
    """Inside, the maps of a model that is applied add what their factors make; `lora` is `optim.lora`."""
    if not lora.rank:
        yield
        return
    token = _scale.set(lora.scale)
    try:
        with programs.maps_apart(), nn.intercept_methods(_add):
            yield
    finally:
        _scale.reset(token)


def _add(next_fun, args, kwargs, context):
    """The result of a method of a module; of a map with factors, with theirs."""
    y, module = next_fun(*args, **kwargs), context.module
    is_map = isinstance(module, (nn.DenseGeneral, layers.Affine))
    if not (is_map and context.method_name == "__call__"):
        return y
    a, b = (module.get_variable("params", name) for name in (low_rank.A, low_rank.B))
    if a is None:
        return y
    x, a, b = dtypes.promote_dtype(args[0], a, b * _scale.get(), dtype=module.dtype)
    if isinstance(module, layers.Affine):
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)
    return y + jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1)


def left_out(params: Any) -> bool:
    """Whether the parameters have factors that a model would not apply here, outside of `beside`."""
    return not _scale.get() and any(True for _ in low_rank.maps_in(params))


@jax.jit
def _fold(kernel, a, b, scale):
    with jax.default_matmul_precision("highest"):
        return low_rank.fold(kernel, a, b, scale)


def merged(params: Any, lora: config_lib.Lora) -> Any:
    """Parameters with their factors folded in, on the devices and with the shardings of their matrices."""
    if not lora.rank:
        return params

    def fold(kernel, a, b, scale):
        folded = _fold(kernel, a, b, scale)
        return jax.device_put(folded, kernel.sharding) if isinstance(kernel, jax.Array) else folded

    return low_rank.merged(params, lora.scale, fold)
