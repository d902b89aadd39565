"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank factors that are trained beside dense maps of the towers.

y = x W + (alpha / rank) (x A) B. A map has factors where its parameters hold `lora_a` [layers, *in, rank] and
`lora_b` [layers, rank, *out]; `layers.Dense` adds them. W is frozen (`Config.frozen`), and A B is never made.
"""

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grain_jax import config as config_lib
from grain_jax.core import errors, low_rank, named
from grain_jax.models import grain


def init(config: config_lib.Config) -> Any:
    """The parameters of a run at step 0, from its seed, boxed with their logical axes.

    The model's are `grain.init`'s. A is normal with the variance 1 / (3 * inputs), as in torch and peft. B is
    zero, so that the model is its base. A tower with factors stores its matrices in `dtype`: they are
    frozen, and each product would cast them.

    Raises:
      UserError: as `maps_of`; or `optim.frozen` freezes a factor.
    """
    key = jax.random.key(config.seed)
    params: Any = grain.init(grain.GRAIN(config.model), key)
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
                        f"optim.frozen: {pattern!r} freezes {name}/{factor}, which optim.lora trains;"
                        " expected no pattern for a tower with factors, whose other parameters are frozen"
                    )
    return _stored(params, config)


def _stored(params: Any, config: config_lib.Config) -> Any:
    """Boxed parameters with the frozen matrices of the towers in `dtype`, as each product reads them."""
    towers = "|".join(tower for tower in ("image", "text") if config.optim.lora.has(tower))
    matrix = re.compile(rf"({towers})/.*/(kernel|embedding)")

    def stored(path, x):
        name = jax.tree_util.keystr(path[:-1], simple=True, separator="/")  # without the box's `value`
        return x.astype(config.dtype) if matrix.fullmatch(name) else x

    return jax.tree_util.tree_map_with_path(stored, params)


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
      UserError: a pattern that matches nothing or something else; a tower would be frozen without a factor;
        or the rank is above the smaller side of a map.
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
                f" {lora.modules!r}, and it would be frozen; expected a pattern that matches one, or"
                " patterns of the other tower only"
            )
    for name in chosen:
        inputs = 1 + config_lib.LAYER_MAPS[name.partition("/blocks/")[2]]
        shape = shapes[f"{name}/kernel"]
        sides = math.prod(shape[1:inputs]), math.prod(shape[inputs:])
        if lora.rank > min(sides):
            raise errors.UserError(
                f"optim.lora.rank: got {lora.rank}, expected at most {min(sides)}, the smaller side of"
                f" {name}, which maps {sides[0]} to {sides[1]}"
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
